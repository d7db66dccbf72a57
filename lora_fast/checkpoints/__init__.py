"""Saves and loads adapter folders: PEFT's two files, and the sidecar of layers that train other parameters."""
