"""Plots and pages, made from the files of run folders and from nothing else."""
