"""Many epochs of a small domain at once."""
