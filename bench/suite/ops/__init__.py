"""The ops of the suite, one file each: its cases, operands, providers, least cost and exact results."""
