"""The files of a federation's repository, written and read strictly: `recipe.yaml`, `lora_start.json`, the card."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from lora_merge.checkpoint.safetensors_file import FileRefused, parse_json
from lora_merge.errors import LoraMergeError, Problem, RefusedError, UsageError
from lora_merge.recipe import Agreed, LoadedRecipe, Recipe, read

RECIPE_NAME, START_NAME, CARD_NAME = "recipe.yaml", "lora_start.json", "README.md"
FILES = (RECIPE_NAME, START_NAME, CARD_NAME)
TAG = "lora-merge-federation"
# What would leave the federation. The rest of the settings may be set otherwise for one run, and is stated if so.
FIXED = ("script", "base_model", "base_commit", "r", "target_modules", "seed_lora_A", "freeze_lora_A", "prompt_form")

_SCHEMA_VERSION = 1
_SHA256 = re.compile("[0-9a-f]{64}")
_MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,511}")


@dataclass(frozen=True)
class Start:
    """Where every client begins: the base model's weights, and the sha256 of each module's lora_A.

    The tensors themselves are drawn by each client from `seed_lora_A`; the hashes prove that they are the same.
    """

    base_model: str
    base_commit: str | None
    base_weights_sha256: str | None
    seed_lora_A: int
    lora_A_sha256: Mapping[str, str]

    def to_json(self) -> str:
        """The file's text: modules sorted, ending in a newline."""
        return json.dumps({"schema_version": _SCHEMA_VERSION, **asdict(self)}, indent=2, sort_keys=True) + "\n"


def contract_files(repo: str, recipe: Recipe, start: Start) -> dict[str, bytes]:
    """The content of each file of the federation `repo`, by name."""
    settings = yaml.safe_dump({"name": recipe.name, **recipe.settings()}, sort_keys=False)
    lead = f"# What every client of {repo} trains by. Settings only: the script is one that lora-merge ships.\n"
    texts = {RECIPE_NAME: lead + settings, START_NAME: start.to_json(), CARD_NAME: _card(repo, recipe, start)}
    return {name: text.encode() for name, text in texts.items()}


def read_contract(
    repo: str, commit: str, recipe: bytes, start: bytes, overrides: list[str] | None = None
) -> LoadedRecipe:
    """The recipe of a federation, from the two files of its repository at `commit`.

    Args:
        overrides: the user's texts `KEY=VALUE`.

    Raises:
        RefusedError: a file is not of the expected form, or the two contradict each other.
        UsageError: an override is wrong, or would leave the federation.
    """
    if taken := [text for text in overrides or [] if text.partition("=")[0].strip() in FIXED]:
        hint = "What one run may set otherwise: epochs or steps, learning_rate, dtype, micro_batch_size and the like."
        raise UsageError(f"--set {taken[0]}: all clients of {repo} share this setting.", hint=hint)
    agreed, path = Agreed(repo, commit, None, {}), Path(f"{repo}@{commit}", RECIPE_NAME)
    try:
        text = recipe.decode("utf-8")
        found = read(text, path, agreed=agreed).recipe
    except (UsageError, UnicodeDecodeError) as error:
        said = error.message if isinstance(error, LoraMergeError) else str(error)
        raise RefusedError([Problem(repo, RECIPE_NAME, " ".join(said.split()))]) from error
    begin = _read_start(repo, start)
    for name in ("base_model", "base_commit", "seed_lora_A"):
        if getattr(begin, name) != getattr(found, name):
            raise RefusedError([Problem(repo, f"{START_NAME}, {name}", f"is not that of {RECIPE_NAME}")])
    agreed = Agreed(repo, commit, begin.base_weights_sha256, begin.lora_A_sha256)
    return read(text, path, overrides or [], agreed)


def _read_start(repo: str, content: bytes) -> Start:
    try:
        data = parse_json(content, START_NAME)
        names = {entry.name for entry in fields(Start)} | {"schema_version"}
        if set(data) != names or data.pop("schema_version") != _SCHEMA_VERSION:
            raise FileRefused(START_NAME, f"must have just {', '.join(sorted(names))}, of version {_SCHEMA_VERSION}")
        return _checked(Start(**data))
    except FileRefused as error:
        raise RefusedError([Problem(repo, error.field, error.reason)]) from error


def _checked(start: Start) -> Start:
    """Its types; what it must share with the recipe is compared there."""
    weights, hashes = start.base_weights_sha256, start.lora_A_sha256
    if weights is not None and not _is_sha256(weights):
        raise FileRefused(f"{START_NAME}, base_weights_sha256", "must be a sha256 in hex, or null")
    if not isinstance(hashes, dict) or not hashes:
        raise FileRefused(f"{START_NAME}, lora_A_sha256", "must map modules to sha256")
    if not all(_MODULE.fullmatch(name) and _is_sha256(value) for name, value in hashes.items()):
        raise FileRefused(f"{START_NAME}, lora_A_sha256", "must map modules to sha256")
    return start


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _card(repo: str, recipe: Recipe, start: Start) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(library_name="peft", tags=["lora", "lora-merge", TAG, "federated-learning"])
    base = f"{recipe.base_model}" + (f" at commit `{recipe.base_commit}`" if recipe.base_commit else "")
    shape = f"r {recipe.r}, alpha {recipe.lora_alpha}, {len(start.lora_A_sha256)} modules"
    lines = [
        f"# Federation {repo}",
        "",
        "Clients that fine-tune one model, each on rows of its own, and merge their LoRA adapters once.",
        f"`{RECIPE_NAME}` has the settings that all of them train by; `{START_NAME}` has the sha256 of the lora_A that",
        "each module starts from, which every client draws from the seed and compares. There is no script here.",
        "",
        f"* Base model: {base}",
        f"* LoRA: {shape}; seed of lora_A {recipe.seed_lora_A}",
        f"* Prompt form: {recipe.prompt_form}; recipe digest `{recipe.digest()}`",
        "",
        "## Take part",
        "",
        "```bash",
        f"lora-merge train {repo} --data rows.jsonl --client-id ORG/NAME --output adapter --push ORG/NAME",
        "```",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"
