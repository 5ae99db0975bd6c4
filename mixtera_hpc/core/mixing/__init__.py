"""Mixtures as numbers: weights, bounds, schedules, and the algorithms that learn them."""
