"""``lora-fast reproduce``."""
