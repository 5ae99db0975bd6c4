"""Read an index: open, select, verify, and join several of them."""
