"""The data set of emoji drawn by several hands, built from the packages in which their artwork is published."""
