"""Answers of the verbs. They are imported only when the verb runs, because the index and numpy take long to import."""
