"""Native sparse attention, skill injection and in-context-learning flow analysis on one JAX model."""

__version__ = "0.1.0"
