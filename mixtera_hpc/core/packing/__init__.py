"""The ways from documents of a stream to sequences, and from sequences to the positions of a batch."""
