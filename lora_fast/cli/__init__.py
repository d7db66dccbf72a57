"""The command lora-fast."""
