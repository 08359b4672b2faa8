"""A recipe: the settings that every client of a federation shares. Load, override, digest, list, copy.

A recipe is a YAML file beside the script that it names. Loading is strict: an unknown, missing or wrongly typed
setting is an error, and all of them are reported at once. See `recipes/README.md` for what each setting means.
"""

import difflib
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from lora_merge.errors import NotFoundError, UsageError

ALL_LINEAR = "all-linear"
PROMPT_FORMS = ("plain", "alpaca", "chat")
SCHEDULES = ("linear", "cosine", "constant")
DTYPES = ("bf16", "fp32")


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
        prompt_form: how a row becomes text: one of `PROMPT_FORMS`.
        max_length: tokens of a row, prompt and answer together; what is longer is cut at its end.
        epochs, steps: passes over the client's rows, or optimiser steps; exactly one of the two.
        learning_rate: the peak, reached at the first step.
        schedule: how the learning rate goes down to the last step: one of `SCHEDULES`.
        batch_size: rows of one optimiser step.
        micro_batch_size: rows held in memory at once; divides `batch_size`.
        dtype: of the frozen weights and the arithmetic: one of `DTYPES`. LoRA weights are always fp32.
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

    def settings(self) -> dict[str, Any]:
        """Every setting but the name, as JSON types."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "name"}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def digest(self) -> str:
        """sha256 of the settings as canonical JSON: keys sorted, no spaces. Names and comments do not count."""
        text = json.dumps(self.settings(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe as it will run, and what the statement says of it.

    Attributes:
        recipe: the settings, overrides applied.
        path: the YAML file.
        digest: of the recipe as the file has it, without overrides: what `aggregate` compares between clients.
        overrides: the ``--set`` values.
    """

    recipe: Recipe
    path: Path
    digest: str
    overrides: Mapping[str, Any]


def load(name_or_path: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe, by the name of a shipped one or the path of a YAML file.

    Args:
        name_or_path: `laptop`, or `./ours.yaml`.
        overrides: texts `KEY=VALUE`, the value read as YAML.

    Raises:
        NotFoundError: there is no such recipe.
        UsageError: settings are unknown, missing or wrong; all are named.
    """
    path = find(name_or_path)
    data = _read(path)
    asked = dict(_override(text) for text in overrides)
    recipe = check(data, str(path))
    final = check({**_without_rival(data, asked), **asked}, "--set") if asked else recipe
    applied = {key: value for key, value in final.settings().items() if key in asked}
    return LoadedRecipe(final, path, recipe.digest(), applied)


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
            values[key] = _CHECKS[key](value)
        except ValueError as error:
            problems.append(f"{key} {error}, is {str(value)[:60]!r}")
    problems = problems or _contradictions(values)
    if problems:
        raise UsageError("\n".join([f"{where}: not a valid recipe:", *(f"  {problem}" for problem in problems)]))
    return Recipe(**values)


def folder() -> Path:
    """Where the shipped recipes are: inside the installed package, or in the checkout beside it."""
    package = Path(__file__).parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped() -> list[Path]:
    """The shipped recipes' YAML files, sorted by name."""
    return sorted(folder().glob("*.yaml"))


def find(name_or_path: str) -> Path:
    """The YAML file of a shipped recipe's name, or of a path (which holds a slash or ends in .yaml or .yml)."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or "/" in name_or_path or "\\" in name_or_path:
        if not path.is_file():
            raise NotFoundError(f"There is no recipe file {name_or_path}.", hint="lora-merge recipes list")
        return path
    names = [entry.stem for entry in shipped()]
    if name_or_path not in names:
        raise NotFoundError(
            f"There is no shipped recipe {name_or_path!r}{_meant(name_or_path, names)}; there are {', '.join(names)}.",
            hint="lora-merge recipes list. A recipe of your own is given as a path: ./NAME.yaml",
        )
    return folder() / f"{name_or_path}.yaml"


def script_of(loaded: LoadedRecipe) -> Path:
    """The script that a recipe names: beside its YAML file, else among the shipped ones. Never downloaded."""
    for place in (loaded.path.parent, folder()):
        if (place / loaded.recipe.script).is_file():
            return place / loaded.recipe.script
    raise NotFoundError(
        f"{loaded.path} names the script {loaded.recipe.script}, which is neither beside it nor shipped.",
        hint=f"Put {loaded.recipe.script} into {loaded.path.parent}, or copy a shipped one: lora-merge recipes copy",
    )


def copy(name: str, destination: Path, *, force: bool = False) -> list[Path]:
    """Copy a shipped recipe's YAML and script into the folder `destination`; returns the two new files.

    Raises:
        UsageError: a file is already there, and `force` is not set.
    """
    loaded = load(name)
    sources = (loaded.path, script_of(loaded))
    targets = [destination / source.name for source in sources]
    if not force and (there := [str(target) for target in targets if target.exists()]):
        raise UsageError(f"Already there: {', '.join(there)}.", hint="--force replaces; or name another folder.")
    destination.mkdir(parents=True, exist_ok=True)
    for source, target in zip(sources, targets, strict=True):
        shutil.copyfile(source, target)
    return targets


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `1e-3` is a number, and a key that comes twice is an error."""


def _unique(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
        raise yaml.YAMLError(f"{', '.join(twice)} comes twice")
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UsageError(f"{path}: not a recipe: must be a mapping from setting to value.")
    return data


def _override(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UsageError(f"--set {text}: must be KEY=VALUE.")
    try:
        return key.strip(), yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text}: the value is not YAML: {error}") from error


def _without_rival(data: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """`--set steps=…` replaces the file's epochs, and the other way round."""
    rival = {"steps": "epochs", "epochs": "steps"}
    gone = {rival[key] for key, value in asked.items() if key in rival and value is not None}
    return {key: value for key, value in data.items() if key not in gone}


def _unknown(key: str, known: Mapping[str, Any]) -> str:
    return f"{key[:60]} is not a setting{_meant(key, list(known))}"


def _meant(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    problems = []
    if (values.get("epochs") is None) == (values.get("steps") is None):
        problems.append("exactly one of epochs and steps must be given")
    if values["batch_size"] % values["micro_batch_size"]:
        problems.append(f"micro_batch_size {values['micro_batch_size']} does not divide batch_size")
    return problems


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


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "name": _text(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", "a word of letters, digits, '.', '_' and '-'"),
    "script": _text(r"[A-Za-z0-9_-]+\.py", "the bare name of a .py file"),
    "base_model": _text(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?", "a repository id"),
    "base_commit": _text(r"[0-9a-f]{40}", "a whole commit of 40 hex digits (quoted), or null"),
    "r": _whole(1),
    "lora_alpha": _whole(1),
    "lora_dropout": _real(0, 1, open_low=False),
    "target_modules": _targets,
    "seed_lora_A": _whole(0),
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
