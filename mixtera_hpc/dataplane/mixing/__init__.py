"""Compute the weights of every chunk from the mixture of a config, and change them on request at run time."""
