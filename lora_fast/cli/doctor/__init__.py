"""``lora-fast doctor``."""
