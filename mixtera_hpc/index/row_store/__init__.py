"""Row stores: the rows of compressed files, written once more so that each domain is read on its own."""
