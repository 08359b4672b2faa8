"""The form of a recipe's file: YAML as people mean it, and one check a setting."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import yaml

ALL_LINEAR = "all-linear"
PROMPT_FORMS = ("plain", "alpaca", "chat")
SCHEDULES = ("linear", "cosine", "constant")
DTYPES = ("bf16", "fp32")


def read_yaml(text: str) -> Any:
    """Parse YAML: `1e-3` is a number, and a key that comes twice is a `yaml.YAMLError`."""
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    """A safe loader of its own, so that nobody else's YAML changes."""


def _unique(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
        raise yaml.YAMLError(f"{', '.join(twice)} comes twice")
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def _whole(low: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if type(value) is not int or not low <= value < 2**31:
            raise ValueError(f"must be a whole number from {low} up")
        return value

    return read


def _real(low: float, high: float, *, open_low: bool = True) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError("must be a number")
        if not low <= value < high or (open_low and value == low):
            raise ValueError(f"must be {'above' if open_low else 'from'} {low:g} and below {high:g}")
        return float(value)

    return read


def _one_of(choices: Sequence[str]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return str(value)

    return read


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("must be true or false")
    return value


def _text(form: str, what: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(form, value):
            raise ValueError(f"must be {what}")
        return value

    return read


def _targets(value: Any) -> str | tuple[str, ...]:
    if value == ALL_LINEAR:
        return ALL_LINEAR
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"must be {ALL_LINEAR} or a list of module names")
    if not all(isinstance(entry, str) and re.fullmatch(r"[A-Za-z0-9_.]{1,200}", entry) for entry in value):
        raise ValueError("must hold module names of letters, digits, '_' and '.'")
    return tuple(sorted(set(value)))


# Each takes a parsed value and returns it as its setting has it, or raises `ValueError` that says what it must be.
CHECKS: dict[str, Callable[[Any], Any]] = {
    "name": _text(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", "a word of letters, digits, '.', '_' and '-'"),
    "script": _text(r"[A-Za-z0-9_-]+\.py", "the bare name of a .py file"),
    "base_model": _text(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?", "a repository id"),
    "base_commit": _text(r"[0-9a-f]{40}", "a whole commit of 40 hex digits (quoted), or null"),
    "r": _whole(1),
    "lora_alpha": _whole(1),
    "lora_dropout": _real(0, 1, open_low=False),
    "target_modules": _targets,
    "seed_lora_A": _whole(0),
    "freeze_lora_A": _flag,
    "prompt_form": _one_of(PROMPT_FORMS),
    "max_length": _whole(2),
    "learning_rate": _real(0, 1),
    "schedule": _one_of(SCHEDULES),
    "batch_size": _whole(1),
    "micro_batch_size": _whole(1),
    "dtype": _one_of(DTYPES),
    "seed": _whole(0),
    "epochs": _real(0, 1000),
    "steps": _whole(1),
}
