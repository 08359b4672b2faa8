"""What `lora-merge evaluate --json` printed, read back for a card."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_merge.card.card import Result, Results
from lora_merge.errors import NotFoundError, UsageError


def read_results(path: Path, *, kind: str, name: str | None) -> Results:
    """The results in the file `path`, for the adapter whose row has this `kind` and (of a local one) this `name`.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it is not what `lora-merge evaluate --json` prints, or does not say which row is meant.
    """
    if not path.is_file():
        raise NotFoundError(f"--evaluation {path}: there is no such file.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        models = [_result(entry) for entry in data["models"]]
        # A path is of this machine: of it, only the file's name is published.
        source = Path(_text(data["data"])).name if _is_path(data["data"]) else _text(data["data"])
        rows = int(data["rows"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        hint = f"lora-merge evaluate … --json > {path}"
        raise UsageError(f"{path} is not what `lora-merge evaluate --json` prints.", hint=hint) from error
    own = [model for model in models if model.kind == kind and (name is None or model.name == name)]
    if len(own) != 1:
        wanted = f"{kind} model" + (f" called {name}" if name else "")
        raise UsageError(f"{path} has {len(own)} rows of a {wanted}; a card is about one.")
    return Results(source, rows, models, own[0])


def _result(entry: Mapping[str, Any]) -> Result:
    loss, perplexity = entry["loss"], entry["perplexity"]
    numbers = [float(number) for number in (loss["value"], loss["low"], loss["high"], perplexity["value"])]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("not a number")
    return Result(_text(entry["name"]), _text(entry["kind"]), *numbers)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("not a text")
    return value


def _is_path(data: object) -> bool:
    return isinstance(data, str) and (os.path.exists(data) or data.count("/") != 1 or data.startswith(("/", ".", "~")))
