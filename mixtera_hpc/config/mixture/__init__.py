"""The mixture as it is written: which domains it names, in which order, and what is wrong with it."""
