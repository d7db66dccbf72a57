"""Adapter layers, and the functions that find them and record merges into their frozen weights."""
