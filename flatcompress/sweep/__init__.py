"""Sweeps: methods x seeds x held-out domains over one recipe, run by a pool of processes, put into one table."""
