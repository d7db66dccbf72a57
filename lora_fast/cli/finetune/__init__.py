"""``lora-fast finetune`` trains adapters of a language model on a text, and reports losses, times and memory."""
