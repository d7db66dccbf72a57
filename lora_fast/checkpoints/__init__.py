"""Adapter files in PEFT's format, with the sidecar of norm-bounded layers and changed base weights."""
