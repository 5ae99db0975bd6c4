"""One module per file format: cut a shard into scan units, scan them, and read single rows."""
