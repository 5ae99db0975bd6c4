"""Records of a run that its ranks write while they serve it, and reading them back."""
