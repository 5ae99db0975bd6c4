"""Read rows that are byte ranges of files, from many files in one loop."""
