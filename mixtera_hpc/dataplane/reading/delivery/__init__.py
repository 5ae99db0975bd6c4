"""The origin of the batches of a session: own reading, or the leader of the group of ranks."""
