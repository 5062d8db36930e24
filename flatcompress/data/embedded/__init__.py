"""The data sets that come with the package or are drawn by it."""
