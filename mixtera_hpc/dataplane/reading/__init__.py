"""Reading the data of a run: from the index to the batches of one rank."""
