"""The sections of bench/gpu.py, which measure what only a GPU can show."""
