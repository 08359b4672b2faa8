"""The command line: the only place with typer and rich. One file a command, one output sink."""
