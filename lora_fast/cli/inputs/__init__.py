"""Reads and checks what a command is given: settings, methods, model and data."""
