"""How the documents of a stream become sequences, and sequences the positions of a batch."""
