"How fast the library is, beside the plain formulation of the paper's algorithm and beside its peers"
