"""The plain-torch twin of every op: its specification, and what runs without a GPU."""
