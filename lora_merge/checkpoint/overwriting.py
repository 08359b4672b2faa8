"""What a result may take the place of: nothing that it is made of, and nothing that is not of its own kind."""

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, TypeAlias

from lora_merge.checkpoint.peft_folder import LEDGER_NAME, read_ledger
from lora_merge.checkpoint.safetensors_file import FileRefused
from lora_merge.errors import UsageError

Kind: TypeAlias = Literal["merged", "client", "model", "rows"]

_TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges.txt"),
    *("*.model", "preprocessor_config.json", "processor_config.json"),
)
# What makes a folder one of a kind, and what else we, PEFT, transformers or a download from the Hub put into it.
_ADAPTER = ("adapter_config.json", "adapter_model.*")
_MARKS: dict[Kind, tuple[str, ...]] = {
    "merged": (*_ADAPTER, LEDGER_NAME),
    "client": _ADAPTER,
    "model": ("config.json", "model*.safetensors"),
    "rows": ("held-out.jsonl",),
}
_BESIDE: dict[Kind, tuple[str, ...]] = {
    "merged": ("lora-merge.lock", "lora-merge.lock.sig", "aggregation_core.*"),
    "client": ("lora_merge.json",),
    "model": ("generation_config.json", "model.safetensors.index.json"),
    "rows": ("*.jsonl",),
}
_NAMES: dict[Kind, str] = {
    "merged": "a merged adapter",
    "client": "a client's adapter",
    "model": "a model",
    "rows": "the demo's rows",
}
_ANYWHERE = ("README.md", ".gitattributes", *_TOKENIZER)


def require_replaceable(output: Path, kind: Kind, option: str = "--output") -> None:
    """Raise `UsageError` unless `output`, which the user gave as `option`, is of this kind and holds nothing else."""
    if not output.is_dir():
        forced = "; --force replaces none but a folder" if option == "--output" else ""
        raise UsageError(f"{output} is not a folder{forced}.", hint=f"Another {option}.")
    names = [entry.name for entry in output.iterdir()]
    strangers = [name for name in names if not _is_known(output / name, kind)]
    lacking = [mark for mark in _MARKS[kind] if not any(fnmatchcase(name, mark) for name in names)]
    if strangers:
        why = f"holds {min(strangers)}, which is no file of one"
    elif lacking:
        why = f"holds no {' and no '.join(lacking)}"
    elif kind == "merged" and (malformed := _malformed(output)):
        why = f"holds {malformed}"
    else:
        return
    forced, way = "; --force leaves it alone", "Choose another --output, or move that folder away."
    if option != "--output":
        forced, way = "", "Move that out of it, or write the result elsewhere with --output."
    raise UsageError(f"{output} is not {_NAMES[kind]} alone: it {why}{forced}.", hint=way)


def require_outside_adapters(output: Path, option: str = "--output") -> None:
    """Raise `UsageError` where `output` lies in an adapter's folder, which then could not be replaced any more."""
    if folder := adapter_around(output):
        raise UsageError(
            f"{option} {output} lies in {folder}, which is an adapter.", hint=f"Choose an {option} apart from it."
        )


def adapter_around(path: Path) -> Path | None:
    """The adapter's folder that `path` lies in, if any, through whatever links."""
    folders = Path(os.path.realpath(path)).parents
    return next((folder for folder in folders if os.path.isfile(folder / "adapter_config.json")), None)


def require_apart(output: Path, inputs: Iterable[Path], option: str = "--output") -> None:
    """Raise `UsageError` where `output` is, lies in, or contains one of `inputs`, through whatever links."""
    here = Path(os.path.realpath(output))
    for path in inputs:
        there = Path(os.path.realpath(path))
        relation = "is" if here == there else "lies in" if there in here.parents else "contains"
        if relation != "contains" or here in there.parents:
            hint = f"What is read is never overwritten: choose an {option} apart from it."
            raise UsageError(f"{option} {output} {relation} the input {path}.", hint=hint)


def _malformed(folder: Path) -> str:
    """What is wrong with the record that makes an adapter a merged one; nothing where it can be read."""
    try:
        read_ledger(folder)
    except FileRefused as error:
        return f"{error.field}: {error.reason}"
    return ""


def _is_known(path: Path, kind: Kind) -> bool:
    if path.name == ".cache":  # of a download from the Hub
        return path.is_dir() and all(entry.name == "huggingface" for entry in path.iterdir())
    plain = path.is_file() and not path.is_symlink()
    return plain and any(fnmatchcase(path.name, name) for name in (*_MARKS[kind], *_BESIDE[kind], *_ANYWHERE))
