"""`python -m lora_merge`: the same as `lora-merge`."""

from lora_merge.cli.main import main

if __name__ == "__main__":
    main()
