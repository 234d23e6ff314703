"""Native Sparse Attention in kernels for Hopper GPUs (Pallas, Mosaic GPU).

Importing this package imports no Pallas; `operators` does, and is loaded when it is selected.
"""
