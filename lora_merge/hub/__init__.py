"""The Hugging Face Hub as we use it: a client with deadlines, its failures as our errors, and who may do what."""
