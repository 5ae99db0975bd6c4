"""Scaling laws of the losses of domains: the history of losses, and the fit."""
