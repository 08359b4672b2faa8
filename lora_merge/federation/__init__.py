"""A federation as a repository: the settings that all clients follow, and the start of lora_A that all begin from."""
