"""The microbenchmark suite: its cases, comparisons, counts and report."""
