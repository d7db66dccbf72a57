"""The microbenchmark suite: cases, comparisons, counts, report."""
