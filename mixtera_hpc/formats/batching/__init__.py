"""Make batches of properties and texts from decoded rows, for the formats that share a representation."""
