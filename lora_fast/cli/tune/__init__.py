"""``lora-fast tune``."""
