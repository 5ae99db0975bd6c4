"""The watchdog: which rank does not get on, where it is, and the end of a run that nobody can continue."""
