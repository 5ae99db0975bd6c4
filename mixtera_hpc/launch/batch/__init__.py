"""The shell code of batch scripts, and the templates in `slurm/templates` that `templates.py` writes from it."""
