"How fast the library is, compared with a plain formulation of the paper's algorithm and with other libraries"
