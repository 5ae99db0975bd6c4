"""From the mixture of a config to the weights of every chunk, and requests to change it at run time."""
