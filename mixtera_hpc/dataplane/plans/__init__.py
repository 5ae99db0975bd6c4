"""Plans of chunks: the weights that rank 0 plans with, the broadcast, and the plans that have arrived on a rank."""
