"""Adapter pairs, and the batches in which an optimizer step processes them."""
