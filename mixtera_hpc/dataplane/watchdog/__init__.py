"""The watchdog: which rank makes no progress, where it is, and the end of a run that cannot continue."""
