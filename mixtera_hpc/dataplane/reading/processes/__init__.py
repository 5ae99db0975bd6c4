"""Reading in processes of a rank, and the memory that they share with it."""
