"""Kernels looked at without a GPU: compiled for every arch, counted and checked in Triton's interpreter."""
