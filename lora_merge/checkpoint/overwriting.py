"""What a result may take the place of: nothing that it is made of, and nothing that is not of its own kind."""

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, TypeAlias

from lora_merge.errors import UsageError

Kind: TypeAlias = Literal["adapter", "model", "rows"]

_TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges.txt"),
    *("*.model", "preprocessor_config.json", "processor_config.json"),
)
# What makes a folder one of a kind, and what else we, PEFT, transformers or a download from the Hub put into it.
_MARKS: dict[Kind, tuple[str, ...]] = {
    "adapter": ("adapter_config.json", "adapter_model.*"),
    "model": ("config.json", "model*.safetensors"),
    "rows": ("held-out.jsonl",),
}
_BESIDE: dict[Kind, tuple[str, ...]] = {
    "adapter": ("lora_merge.json", "aggregation.json", "lora-merge.lock", "lora-merge.lock.sig", "aggregation_core.*"),
    "model": ("generation_config.json", "model.safetensors.index.json"),
    "rows": ("*.jsonl",),
}
_NAMES: dict[Kind, str] = {"adapter": "an adapter", "model": "a model", "rows": "the demo's rows"}
_ANYWHERE = ("README.md", ".gitattributes", *_TOKENIZER)


def require_replaceable(output: Path, kind: Kind, option: str = "--output") -> None:
    """Raise `UsageError` unless `output`, which the user gave as `option`, is of this kind and holds nothing else."""
    if not output.is_dir():
        forced = "; --force replaces none but a folder" if option == "--output" else ""
        raise UsageError(f"{output} is not a folder{forced}.", hint=f"Another {option}.")
    names = [entry.name for entry in output.iterdir()]
    strangers = [name for name in names if not _is_known(output / name, kind)]
    if not strangers and all(any(fnmatchcase(name, mark) for name in names) for mark in _MARKS[kind]):
        return
    why = f"holds {min(strangers)}, which is no file of one" if strangers else f"holds no {' and '.join(_MARKS[kind])}"
    forced, way = "; --force leaves it alone", "Choose another --output, or move that folder away."
    if option != "--output":
        forced, way = "", "Move that out of it, or write the result elsewhere with --output."
    raise UsageError(f"{output} is not {_NAMES[kind]} alone: it {why}{forced}.", hint=way)


def require_outside_adapters(output: Path, option: str = "--output") -> None:
    """Raise `UsageError` where `output` lies in an adapter's folder, which then could not be replaced any more."""
    for folder in Path(os.path.realpath(output)).parents:
        if (folder / "adapter_config.json").is_file():
            raise UsageError(
                f"{option} {output} lies in {folder}, which is an adapter.", hint=f"Choose an {option} apart from it."
            )


def require_apart(output: Path, inputs: Iterable[Path], option: str = "--output") -> None:
    """Raise `UsageError` where `output` is, lies in, or contains one of `inputs`, through whatever links."""
    here = Path(os.path.realpath(output))
    for path in inputs:
        there = Path(os.path.realpath(path))
        relation = "is" if here == there else "lies in" if there in here.parents else "contains"
        if relation != "contains" or here in there.parents:
            hint = f"What is read is never overwritten: choose an {option} apart from it."
            raise UsageError(f"{option} {output} {relation} the input {path}.", hint=hint)


def _is_known(path: Path, kind: Kind) -> bool:
    if path.name == ".cache":  # of a download from the Hub
        return path.is_dir() and all(entry.name == "huggingface" for entry in path.iterdir())
    plain = path.is_file() and not path.is_symlink()
    return plain and any(fnmatchcase(path.name, name) for name in (*_MARKS[kind], *_BESIDE[kind], *_ANYWHERE))
