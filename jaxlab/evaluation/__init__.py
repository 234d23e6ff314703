"""Measures on logits, and the tasks that evaluate and generate."""
