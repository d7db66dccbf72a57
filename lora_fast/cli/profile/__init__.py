"""``lora-fast profile``: measures what fusing brings for a model."""
