"Classify the tree species of a leaf"
__version__ = '0.1.0'
