"""Measures time, memory and a device's ceilings, for the command line and bench/."""
