"""One short module per trainer; each imports only its own library."""
