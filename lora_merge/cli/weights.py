"""The options that say how clients are weighted."""

import json
from pathlib import Path
from typing import Any

from lora_merge.errors import NotFoundError, UsageError


def weights_given(choice: str | None, single: list[str]) -> Any:
    """`examples`, `uniform`, or a mapping from a file and from single weights; None where nothing is said."""
    given: dict[str, float] = {}
    if choice not in (None, "examples", "uniform"):
        given |= _weights_file(Path(choice))
    for entry in single:
        source, equals, number = entry.rpartition("=")
        try:
            given[source] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise UsageError(f"--weight must be SOURCE=NUMBER, is {entry!r}.")
    if single and choice == "uniform":
        raise UsageError("--weights uniform and --weight exclude each other.")
    return given or choice


def _weights_file(path: Path) -> dict[str, float]:
    if not path.is_file():
        hint = "--weights takes examples, uniform, or the path of a JSON or YAML file."
        raise NotFoundError(f"No such weights file: {path}.", hint=hint)
    try:
        if path.suffix == ".json":
            data = json.loads(path.read_text(encoding="utf-8"))
        else:
            import yaml

            data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception as error:  # each parser has its own errors
        raise UsageError(f"{path} cannot be read as weights: {' '.join(str(error).split())}.") from error
    if not isinstance(data, dict) or not data:
        raise UsageError(f"{path} must be a mapping from client or source to number.")
    return {str(name): number for name, number in data.items()}
