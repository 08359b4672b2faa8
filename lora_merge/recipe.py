"""A recipe: the settings that every client of a federation shares. Read, checked, overridden, digested.

A recipe is a YAML file beside the script that it names. Loading is strict: an unknown, missing or wrongly typed
setting is an error, and all of them are reported at once. See `recipes/README.md` for what each setting means.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from lora_merge.errors import UsageError, meant
from lora_merge.recipe_form import CHECKS, read_yaml

FEDERATION = re.compile(r"(?P<repo>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(?:@(?P<revision>[^\s@]+))?")


@dataclass(frozen=True)
class Recipe:
    """The settings of one recipe; all but `name` go into its digest.

    Attributes:
        name: what people call it.
        script: the Python file beside the YAML that does the training.
        base_model: repository id of the model that is fine-tuned.
        base_commit: its commit; None is the newest (what was used is recorded).
        r, lora_alpha, lora_dropout, target_modules: the LoRA shape; `target_modules` may be "all-linear".
        seed_lora_A: the seed of the lora_A that all clients start from.
        freeze_lora_A: train lora_B alone, so that all keep one lora_A: what the method `ffa` merges.
        prompt_form: how a row becomes text: `plain`, `alpaca` or `chat`.
        max_length: tokens of a row, prompt and answer together; what is longer is cut at its end.
        epochs, steps: passes over the client's rows, or optimiser steps; exactly one of the two.
        learning_rate: the peak, reached at the first step.
        schedule: how the learning rate goes down to the last step: `linear` (to zero), `cosine` or `constant`.
        batch_size: rows of one optimiser step.
        micro_batch_size: rows held in memory at once; divides `batch_size`.
        dtype: of the frozen weights and the arithmetic: `bf16` or `fp32`. LoRA weights are always fp32.
        seed: of dropout and, with the client id, of the order of the rows.
    """

    name: str
    script: str
    base_model: str
    r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: str | tuple[str, ...]
    seed_lora_A: int
    prompt_form: str
    max_length: int
    learning_rate: float
    schedule: str
    batch_size: int
    micro_batch_size: int
    dtype: str
    seed: int
    base_commit: str | None = None
    epochs: float | None = None
    steps: int | None = None
    freeze_lora_A: bool = False

    def settings(self) -> dict[str, Any]:
        """Every setting but the name, as JSON types; for the digest's sake one that came later only where it is set."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "name"}
        if not self.freeze_lora_A:
            del values["freeze_lora_A"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def digest(self) -> str:
        """sha256 of the settings as canonical JSON: keys sorted, no spaces. Names and comments do not count."""
        text = json.dumps(self.settings(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Agreed:
    """What a federation's repository fixes beside the settings.

    Attributes:
        repo, commit: the repository, and the commit of it that is followed.
        base_weights_sha256: of the base model; None where whoever made the federation did not have it.
        start: the sha256 of the lora_A that each module starts from.
    """

    repo: str
    commit: str
    base_weights_sha256: str | None
    start: Mapping[str, str]


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe as it will run, and what the statement says of it.

    Attributes:
        recipe: the settings, overrides applied.
        path: the YAML file.
        digest: of the recipe as the file has it, without overrides: what `aggregate` compares between clients.
        overrides: the ``--set`` values.
        agreed: of a federation on the Hub; None for a file.
    """

    recipe: Recipe
    path: Path
    digest: str
    overrides: Mapping[str, Any]
    agreed: Agreed | None = None

    @property
    def name(self) -> str:
        """What the statement calls it: `org/federation@commit`, or the name in the file."""
        return f"{self.agreed.repo}@{self.agreed.commit}" if self.agreed else self.recipe.name


def read(text: str, path: Path, overrides: Sequence[str] = (), agreed: Agreed | None = None) -> LoadedRecipe:
    """Read a recipe's text, which lies at `path`; raises `UsageError` as `load` does."""
    data = _parse(text, path)
    asked = dict(_override(text) for text in overrides)
    recipe = check(data, str(path))
    final = check({**_without_rival(data, asked), **asked}, "--set") if asked else recipe
    applied = {key: value for key, value in final.settings().items() if key in asked}
    return LoadedRecipe(final, path, recipe.digest(), applied, agreed)


def check(data: Mapping[str, Any], where: str) -> Recipe:
    """The recipe that `data` states.

    Raises:
        UsageError: every unknown, missing or wrong setting, in one message.
    """
    known = {entry.name: entry for entry in fields(Recipe)}
    problems = [_unknown(key, known) for key in data if key not in known]
    problems += [f"{key} is missing" for key, entry in known.items() if key not in data and entry.default is MISSING]
    values = {key: value for key, value in data.items() if key in known}
    for key, value in values.items():
        if value is None and known[key].default is None:
            continue
        try:
            values[key] = CHECKS[key](value)
        except ValueError as error:
            problems.append(f"{key} {error}, is {str(value)[:60]!r}")
    problems = problems or _contradictions(values)
    if problems:
        raise UsageError(f"{where}: not a valid recipe:", more=[f"  {problem}" for problem in problems])
    return Recipe(**values)


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        data = read_yaml(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"{path}: not a YAML file: {what_is_wrong(error)}") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UsageError(f"{path}: not a recipe: must be a mapping from setting to value.")
    return data


def what_is_wrong(error: Exception) -> str:
    """What is wrong and where, in one line; a YAML error itself draws the place over several."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"{getattr(error, 'problem', 'unreadable')}, in line {mark.line + 1}, column {mark.column + 1}"


def _override(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UsageError(f"--set {text}: must be KEY=VALUE.")
    if key.strip() == "name":
        raise UsageError("--set name: a recipe that should have another name is a file of its own.")
    try:
        return key.strip(), read_yaml(value)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"--set {text}: the value is not YAML: {what_is_wrong(error)}") from error


def _without_rival(data: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """`--set steps=…` replaces the file's epochs, and the other way round."""
    rival = {"steps": "epochs", "epochs": "steps"}
    gone = {rival[key] for key, value in asked.items() if key in rival and value is not None}
    return {key: value for key, value in data.items() if key not in gone}


def _unknown(key: str, known: Mapping[str, Any]) -> str:
    return f"{key[:60]} is not a setting{meant(key, known)}"


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    problems = []
    if (values.get("epochs") is None) == (values.get("steps") is None):
        problems.append("exactly one of epochs and steps must be given")
    if values["batch_size"] % values["micro_batch_size"]:
        problems.append(f"micro_batch_size {values['micro_batch_size']} does not divide batch_size")
    return problems
