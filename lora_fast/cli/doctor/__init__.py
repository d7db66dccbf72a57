"""``lora-fast doctor`` checks the installation."""
