"""``lora-fast reproduce``: repeats experiments of the methods' papers."""
