"""One file per op: its cases, operands and providers."""
