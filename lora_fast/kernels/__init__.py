"""Triton kernels and their launchers: torch and triton only, nothing of lora_fast."""
