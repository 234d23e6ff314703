"""Native Sparse Attention in plain XLA: the reference, and what runs everywhere."""
