"""Attention kernels, one folder per op. Nothing here imports jaxlab."""
