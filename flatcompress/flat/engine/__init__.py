"""The exact engine under every flat-minima method: probes, perturbations, passes, processes, gradient hooks."""
