"""A run while it trains: new events of its metrics, its present state, and that state as lines of a terminal."""
