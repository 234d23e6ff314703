"""Flows in XLA."""
