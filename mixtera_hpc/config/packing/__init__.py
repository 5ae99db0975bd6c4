"""Settings of packing, balancing and micro-batches."""
