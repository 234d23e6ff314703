"""The forms in which a model is stored, a module for each; open.py chooses among them."""
