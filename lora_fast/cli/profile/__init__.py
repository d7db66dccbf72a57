"""``lora-fast profile``."""
