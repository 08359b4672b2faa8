"""A global adapter merged into its base: one ordinary model folder."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_merge.checkpoint.folder import atomic_folder, check_free
from lora_merge.checkpoint.overwriting import require_apart
from lora_merge.errors import UsageError
from lora_merge.evaluation.belonging import require_belonging
from lora_merge.evaluation.models import attach_in_place, load_base, open_adapters
from lora_merge.sources.base_models import find_model
from lora_merge.sources.local import folders_named
from lora_merge.training.base_model import load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What a tokenizer is made of, whichever kind it is; copied as it is, so that it stays the same to the byte.
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges.txt"),
    *("*.model", "preprocessor_config.json", "processor_config.json"),
)


@dataclass(frozen=True)
class Exported:
    """A model folder that was written: its float type, parameters, and bytes on the disk."""

    output: Path
    dtype: str
    parameters: int
    nbytes: int


def export(
    adapter: str | Path,
    base: str,
    output: Path,
    *,
    dtype: str = "fp32",
    force: bool = False,
    tell: Callable[[str], None],
    warn: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write the base model with the adapter's update merged into its weights, and the base's tokenizer.

    The update is added in fp32 and rounded once, at the file: added to bf16 weights, much of a small update is lost.

    Args:
        adapter: an adapter's folder or repository, merged or one client's.
        base: the base model's folder or repository id.
        output: the folder to make.
        dtype: of the file: fp32, bf16 or fp16.
        force: replace the model that is at `output`.
        warn: called with a line where the adapter was trained on other weights than the base's.

    Raises:
        UsageError: `output` exists, or the base is not a model.
        RefusedError: the adapter was refused, or does not fit the base.
        NotFoundError, NetworkError: the adapter or the base is not there.
    """
    require_apart(output, folders_named([adapter, base]))
    check_free(output, force=force, kind="model")
    with open_adapters([adapter], tell=tell) as opened:
        if len(opened) != 1:
            raise UsageError(f"{adapter} names {len(opened)} adapters; one is exported.")
        found = find_model(base, tell)
        require_belonging(found, [opened[0].adapter], warn)
        load_tokenizer(found)  # a folder without a tokenizer is of no use, so say so before the work
        tell(f"Merging {adapter} into {base} in fp32")
        model = attach_in_place(load_base(found, "fp32", torch.device("cpu")), opened[0].adapter)
    merged = model.merge_and_unload(safe_merge=True).to(DTYPES[dtype])
    tell(f"Writing {output}")
    with atomic_folder(output, force=force, kind="model") as folder:
        merged.save_pretrained(folder, safe_serialization=True)
        _copy_tokenizer(found.folder, folder)
    nbytes = sum(path.stat().st_size for path in output.iterdir())
    return Exported(output, dtype, merged.num_parameters(), nbytes)


def _copy_tokenizer(base: Path, folder: Path) -> None:
    for pattern in _TOKENIZER_FILES:
        for path in sorted(base.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
