"""`mixtera-hpc migrate`: read the data sets and weights of another loader, and write an experiment of them."""
