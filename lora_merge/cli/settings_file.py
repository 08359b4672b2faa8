"""Defaults of options from the environment and from `lora-merge.toml`, below what is typed; strictly read."""

import os
import sys
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import typer

from lora_merge.errors import UsageError, meant

FILE_NAME = "lora-merge.toml"
PREFIX = "LORA_MERGE_"
# What belongs to an option: where the environment, or the user, sets the first, the others that stand further down are
# of another method, and do not count.
BELONGS_TO = {
    "method": ("rank", "energy", "density"),
    "rank": ("energy",),
    "robust": ("byzantine", "trim"),
    "weight": ("weights",),
    "weights": ("weight",),
}


class _Set(NamedTuple):
    """What an option is set to, how it is typed, and where it was set."""

    value: Any
    option: str
    origin: str


_Path: TypeAlias = tuple[str, ...]  # of a command: `("recipes", "list")`
_Layer: TypeAlias = dict[_Path, dict[str, _Set]]  # each command's parameters by name

_set_by: dict[str, str] = {}  # of the command that runs: `--rank` to `LORA_MERGE_AGGREGATE_RANK` or the file


def load_defaults(context: typer.Context) -> None:
    """Take what the environment sets, then what `lora-merge.toml` does, as defaults of what the user does not type.

    A variable is LORA_MERGE_, the command and the option: `LORA_MERGE_AGGREGATE_GLOBAL_LR=0.5`; where an option may be
    repeated, its words are its values. In the file a table is a command: `[aggregate]`, `global-lr = 0.5`, and
    `[recipes.list]` for a command of a command.

    Raises:
        UsageError: the file is not TOML, or one of them names a command or an option that does not exist.
    """
    commands: Mapping[str, Any] = context.command.commands  # type: ignore[attr-defined]
    _set_by.clear()
    context.default_map = defaults = dict[str, Any]()
    for path, options in _over(_of_environment(commands), _of_file(commands)).items():
        table = defaults
        for name in path:
            table = table.setdefault(name, {})
        table |= {name: each.value for name, each in options.items()}
        if path[0] in sys.argv:
            _set_by.update({each.option: each.origin for each in options.values()})


def require_hub_address() -> None:
    """Raise `UsageError` where HF_ENDPOINT is no address: the Hub's library would fail while it is imported."""
    address = os.environ.get("HF_ENDPOINT")
    if not address:
        return
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(address)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise UsageError(f"HF_ENDPOINT must be the address of a Hub, as in https://huggingface.co, is {address!r}.")


def without_those_typed_over(context: typer.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of options by name, None where one was not typed, and what it belongs to was."""
    typed = {
        name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    gone = _set_aside(typed)
    return {name: None if name in gone else value for name, value in values.items()}


def _over(upper: _Layer, lower: _Layer) -> _Layer:
    """Both layers as one: of what both set, the upper one's."""
    found = dict[_Path, dict[str, _Set]]()
    for path in {**lower, **upper}:
        above = upper.get(path, {})
        gone = _set_aside(above)
        found[path] = {name: each for name, each in lower.get(path, {}).items() if name not in gone} | above
    return found


def _set_aside(above: Collection[str]) -> set[str]:
    """The options that do not count further down, where those `above` are set."""
    return {part for name in above for part in BELONGS_TO.get(name, ())}.difference(above)


def set_elsewhere(message: str) -> str:
    """Where the options that `message` is about were set, if that was not on the command line."""
    typed = {argument.partition("=")[0] for argument in sys.argv}
    found = [f"{option} is set by {origin}" for option, origin in _set_by.items() if _names(message, option)]
    return "; ".join(entry for entry in found if entry.split(" ")[0] not in typed)


def _names(message: str, option: str) -> bool:
    return any(word.strip("'\":;,.()") == option for word in message.split())


def _of_file(commands: Mapping[str, Any]) -> _Layer:
    path = Path(FILE_NAME)
    if not os.path.lexists(path):
        return {}
    if not path.is_file():
        raise UsageError(f"{FILE_NAME} is there and is no file that could be read: a folder, or a link to nothing.")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise UsageError(f"{FILE_NAME} is nested too deeply.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{FILE_NAME} is not valid TOML: {error}.") from error
    return {path: options for name, table in tables.items() for path, options in _tables(commands, (name,), table)}


def _tables(commands: Mapping[str, Any], path: _Path, table: Any) -> Iterator[tuple[_Path, dict[str, _Set]]]:
    name = path[-1]
    if name not in commands or not isinstance(table, dict):
        raise UsageError(f"{FILE_NAME} has the entry {'.'.join(path)!r}, which is no command{meant(name, commands)}.")
    if inner := getattr(commands[name], "commands", None):
        for key, value in table.items():
            yield from _tables(inner, (*path, key), value)
        return
    options = _options(commands[name])
    for key, value in table.items():
        where = f"[{'.'.join(path)}] {key}"
        if key not in options:
            raise UsageError(f"{FILE_NAME} has {where}, which is no option of {name}{meant(key, options)}.")
        if options[key].multiple and not isinstance(value, list):
            raise UsageError(f"{FILE_NAME} has {where} = {value!r}, which must be a list.", hint=f"{key} = [{value!r}]")
    yield path, {options[key].name: _Set(value, f"--{key}", FILE_NAME) for key, value in table.items()}


def _of_environment(commands: Mapping[str, Any]) -> _Layer:
    known = {
        PREFIX + "_".join((*path, option)).upper().replace("-", "_"): (path, option, parameter)
        for path, command in _leaves(commands)
        for option, parameter in _options(command).items()
    }
    found: _Layer = {}
    for variable, text in os.environ.items():
        if not variable.startswith(PREFIX):
            continue
        if variable not in known:
            raise UsageError(f"The environment has {variable}, which sets no option{meant(variable, known)}.")
        path, option, parameter = known[variable]
        value = text.split() if parameter.multiple else text
        found.setdefault(path, {})[parameter.name] = _Set(value, f"--{option}", variable)
    return found


def _leaves(commands: Mapping[str, Any], path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    for name, command in commands.items():
        if inner := getattr(command, "commands", None):
            yield from _leaves(inner, (*path, name))
        else:
            yield (*path, name), command


def _options(command: Any) -> dict[str, Any]:
    """The long options of a command, without their dashes."""
    return {option.removeprefix("--"): each for each in command.params for option in each.opts if "--" in option}
