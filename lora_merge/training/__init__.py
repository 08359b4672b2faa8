"""A client's fine-tuning: read rows, find the base, start lora_A from the shared seed, fit, write the adapter."""
