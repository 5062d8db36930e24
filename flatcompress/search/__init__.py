"""Search: bits per layer x channels per group x method and radius x anything else of a recipe, for a Pareto front."""
