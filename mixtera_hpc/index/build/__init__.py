"""Write an index: discover shards, merge scan results, publish the file; refresh and derive."""
