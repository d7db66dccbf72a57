"""Inspects kernels without a GPU: compiles them for every arch, and counts and checks their memory accesses in Triton's
interpreter."""
