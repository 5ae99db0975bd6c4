"""The parts of `python -m bench peers`. `systems.py` has the table of what is measured."""
