"""What a cut costs and which channels to cut within a budget."""
