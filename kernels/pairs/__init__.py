"""Kernels over all adapter pairs at once: Grams, AdamW, the methods, merges."""
