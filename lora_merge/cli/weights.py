"""The options that say how clients are weighted."""

from pathlib import Path
from typing import Any

from lora_merge.checkpoint.safetensors_file import parse_json
from lora_merge.errors import NotFoundError, UsageError


def weights_given(choice: str | None, single: list[str]) -> Any:
    """`examples`, `uniform`, or a mapping from a file and from single weights; None where nothing is said."""
    given, typed = dict[str, float](), dict[str, float]()
    if choice not in (None, "examples", "uniform"):
        given |= _weights_file(Path(choice))
    for entry in single:
        source, equals, number = entry.rpartition("=")
        try:
            one = {source: float(number)}
        except ValueError:
            equals = ""
        if not equals:
            raise UsageError(f"--weight must be SOURCE=NUMBER, is {entry!r}.")
        if source in typed:
            raise UsageError(f"--weight gives {source} two weights.")
        typed |= one
    if single and choice == "uniform":
        raise UsageError("--weights uniform and --weight exclude each other.")
    return given | typed or choice


def _weights_file(path: Path) -> dict[str, float]:
    if not path.is_file():
        hint = "--weights takes examples, uniform, or the path of a JSON or YAML file."
        raise NotFoundError(f"No such weights file: {path}.", hint=hint)
    try:
        if path.suffix == ".json":
            data = parse_json(path.read_bytes(), "the file")
        else:
            from lora_merge.recipe_form import read_yaml

            data = read_yaml(path.read_text(encoding="utf-8"))
    except Exception as error:  # each parser has its own errors
        raise UsageError(f"{path} cannot be read as weights: {' '.join(str(error).split())}.") from error
    if not isinstance(data, dict) or not data:
        raise UsageError(f"{path} must be a mapping from client or source to number.")
    return {str(name): number for name, number in data.items()}
