"""The steps of one rank: those that are open, their losses, and what ranks agree on about them."""
