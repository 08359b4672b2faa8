"""`lora_merge.json`: what a client itself states about its adapter. Written by `train`, read by `aggregate`.

A statement is a claim, not a proof: it is checked for form here and for agreement between clients in
`lora_merge.aggregation.compatibility`.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lora_merge.errors import Malformed

FILE_NAME = "lora_merge.json"
SCHEMA_VERSION = 1
MAX_BYTES = 1 << 20

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_HEX = re.compile(r"[0-9a-f]{40,64}")
_PLAIN = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,200}")


class StatementError(Malformed):
    """A statement is malformed. ``field`` names the entry."""


@dataclass(frozen=True)
class BaseModel:
    """The model that was fine-tuned: its repository, the commit, and the sha256 of its weight files."""

    repo: str | None = None
    commit: str | None = None
    weights_sha256: str | None = None


@dataclass(frozen=True)
class RecipeRef:
    """The recipe that a client followed; ``overrides`` are its ``--set`` values.

    ``prompt_form`` is named by itself because adapters trained on different forms do not average.
    """

    name: str
    digest: str
    prompt_form: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Statement:
    """One client's statement. Only ``client_id`` must be there.

    Attributes:
        client_id: `org/name` or `name`; clients are sorted by it.
        base_model: what was fine-tuned.
        num_examples: rows trained on; the default weight of the client.
        recipe: the shared settings, by digest.
        local_epochs: passes over the client's data (may be a fraction).
        steps: optimiser steps taken.
        seed_lora_A: the seed that every client's lora_A started from; None where each drew its own.
        trained_at: start and end, ISO 8601 in UTC.
        versions: package name to version.
        tokens: tokens trained on.
    """

    client_id: str
    base_model: BaseModel = BaseModel()
    num_examples: int | None = None
    recipe: RecipeRef | None = None
    local_epochs: float | None = None
    steps: int | None = None
    tokens: int | None = None
    seed_lora_A: int | None = None
    trained_at: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The file's text: keys in the order above, ending in a newline."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, data: object) -> "Statement":
        """Read a parsed file strictly.

        Raises:
            StatementError: an entry is unknown, of a wrong type, or out of bounds.
        """
        data = dict(_mapping("lora_merge.json", data))
        version = data.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise StatementError("schema_version", f"must be {SCHEMA_VERSION}, is {version!r}")
        known = {entry.name for entry in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise StatementError(unknown[0][:100], "unknown entry")
        recipe = data.get("recipe")
        return cls(
            client_id=check_client_id(data.get("client_id")),
            base_model=_base_model(data.get("base_model")),
            num_examples=_count("num_examples", data.get("num_examples")),
            recipe=None if recipe is None else _recipe(recipe),
            local_epochs=_number("local_epochs", data.get("local_epochs")),
            steps=_count("steps", data.get("steps")),
            tokens=_count("tokens", data.get("tokens")),
            seed_lora_A=_count("seed_lora_A", data.get("seed_lora_A")),
            trained_at=_strings("trained_at", data.get("trained_at")),
            versions=_strings("versions", data.get("versions")),
        )


def check_client_id(value: object) -> str:
    """`value` where it is `org/name` or `name` in the Hub's letters; raises `StatementError` otherwise."""
    if not (isinstance(value, str) and _ID.fullmatch(value)):
        raise StatementError("client_id", "must be ORG/NAME or NAME of letters, digits, '.', '_' and '-'")
    return value


def _base_model(value: object) -> BaseModel:
    entries = _mapping("base_model", value)
    if unknown := sorted(set(entries) - {"repo", "commit", "weights_sha256"}):
        raise StatementError(f"base_model.{unknown[0][:100]}", "unknown entry")
    return BaseModel(
        repo=_text("base_model.repo", entries.get("repo"), _PLAIN),
        commit=_text("base_model.commit", entries.get("commit"), _HEX),
        weights_sha256=_text("base_model.weights_sha256", entries.get("weights_sha256"), _HEX),
    )


def _recipe(value: object) -> RecipeRef:
    entries = _mapping("recipe", value)
    known = {"name", "digest", "prompt_form", "overrides"}
    if set(entries) - known or entries.get("name") is None or entries.get("digest") is None:
        raise StatementError("recipe", "must hold name, digest, prompt_form and overrides")
    return RecipeRef(
        name=_text("recipe.name", entries["name"], _PLAIN) or "",
        digest=_text("recipe.digest", entries["digest"], _HEX) or "",
        prompt_form=_text("recipe.prompt_form", entries.get("prompt_form"), _PLAIN),
        overrides=dict(_mapping("recipe.overrides", entries.get("overrides"))),
    )


def _mapping(name: str, value: object) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise StatementError(name, "must be an object")
    return value


def _strings(name: str, value: object) -> Mapping[str, str]:
    entries = _mapping(name, value)
    if None in entries.values():
        raise StatementError(name, "must hold texts")
    return {_text(name, key, _PLAIN) or "": _text(name, text, _PLAIN) or "" for key, text in entries.items()}


def _text(name: str, value: object, form: re.Pattern[str]) -> str | None:
    if value is not None and not (isinstance(value, str) and form.fullmatch(value)):
        raise StatementError(name, "must be a short text of the expected form")
    return value


def _count(name: str, value: object) -> int | None:
    if value is not None and not (type(value) is int and 0 <= value < 2**63):
        raise StatementError(name, f"must be a whole number from 0 up, is {str(value)[:40]}")
    return value


def _number(name: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise StatementError(name, f"must be a finite number from 0 up, is {str(value)[:40]}")
    return float(value)
