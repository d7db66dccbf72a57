"""``lora-fast finetune``."""
