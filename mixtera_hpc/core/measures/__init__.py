"""Measures beside losses: scalars of the user's, and the number of held-out sequences of a validation."""
