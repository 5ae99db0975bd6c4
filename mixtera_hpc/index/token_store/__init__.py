"""Token stores: the token ids of all documents of an index, made once and served by row."""
