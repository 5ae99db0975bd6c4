"""From decoded rows to batches of properties and texts, for the formats that share a representation."""
