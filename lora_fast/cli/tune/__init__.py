"""``lora-fast tune`` measures which kernels are fastest for a model on this GPU."""
