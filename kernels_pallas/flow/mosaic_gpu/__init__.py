"""Flows on Hopper GPUs."""
