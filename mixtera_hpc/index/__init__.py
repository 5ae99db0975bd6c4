"""The property index: one HDF5 file that records what every sample is and where it lies."""
