"""What ``lora-fast profile`` measures: engines.py builds them, each other file takes one kind of figure."""
