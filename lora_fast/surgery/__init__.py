"""Puts adapter layers into a model, fuses PEFT's, and merges them."""
