"""Documents of sequences that are not simply the next items of a stream, and the order of positions in a batch."""
