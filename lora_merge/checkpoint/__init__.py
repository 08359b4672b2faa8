"""PEFT folders: strict reading into lazy adapters, streamed writing, atomic folders."""
