"""The sections of bench/gpu.py: all that only a GPU can show."""
