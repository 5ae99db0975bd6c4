"""Slurm: its commands, and what srun reports about ranks."""
