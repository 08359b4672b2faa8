"""`lora-merge.toml`: a folder's own defaults for the options of each command."""

import difflib
import tomllib
from pathlib import Path
from typing import Any

import typer

from lora_merge.errors import UsageError

FILE_NAME = "lora-merge.toml"


def load_defaults(context: typer.Context) -> None:
    """Take the options in `lora-merge.toml`, where there is one, as defaults below the environment's and the user's.

    A table is a command, its keys are the command's long options: `[aggregate]`, `global-lr = 0.5`.

    Raises:
        UsageError: the file is not TOML, or names a command or an option that does not exist.
    """
    path = Path(FILE_NAME)
    if not path.is_file():
        return
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{FILE_NAME} is not valid TOML: {error}.") from error
    context.default_map = {name: _defaults(context, name, table) for name, table in tables.items()}


def _defaults(context: typer.Context, name: str, table: Any) -> dict[str, Any]:
    commands: dict[str, Any] = context.command.commands  # type: ignore[attr-defined]
    if name not in commands or not isinstance(table, dict):
        raise UsageError(f"{FILE_NAME} has the entry {name!r}, which is no command.{_near(name, commands)}")
    options = {option.removeprefix("--"): p.name for p in commands[name].params for option in p.opts if "--" in option}
    for key in table:
        if key not in options:
            raise UsageError(f"{FILE_NAME} has [{name}] {key}, which is no option of {name}.{_near(key, options)}")
    return {options[key]: value for key, value in table.items()}


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
