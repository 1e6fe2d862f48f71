"""Grids of runs: what a grid file says, its cells, the choice of settings and the tidy table."""
