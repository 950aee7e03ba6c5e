"""Directions of a space in which nothing changes, told before a search wastes candidates on them."""
