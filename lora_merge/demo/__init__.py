"""What `lora-merge demo` works on: a real small model, and the text that every Python installation has."""
