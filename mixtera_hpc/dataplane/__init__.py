"""One rank's data of a run: from the plan of a chunk to batches, and from losses back to the mixture."""
