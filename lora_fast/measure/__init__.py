"""Measures time, memory and the ceilings of a device, for the command line and bench/."""
