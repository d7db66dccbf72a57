"""Batched r×r linear algebra: SPD solves, inverses, nonnegative least squares."""
