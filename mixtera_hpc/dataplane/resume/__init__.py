"""Where an attempt continues: saved states, edits of a run, and what identifies it."""
