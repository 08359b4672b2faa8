"""The models that are compared: the base, read once, and each adapter on a tree that shares the base's matrices."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_merge.adapter import FactorsSpec, FullSpec, TokenSpec
from lora_merge.checkpoint.layout import PREFIX, TOKEN_SUFFIX
from lora_merge.checkpoint.peft_folder import LEDGER_NAME, FolderRefused, PeftFolder, open_folder
from lora_merge.checkpoint.writer import merged_config
from lora_merge.errors import NotFoundError, Problem, RefusedError
from lora_merge.sources.base_models import FoundBase
from lora_merge.training.base_model import load_model

if TYPE_CHECKING:
    from peft import LoraConfig


def load_base(found: FoundBase, dtype: str, device: torch.device) -> Any:
    """The base model, frozen, in evaluation mode, in `dtype` (fp32 or bf16)."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # the terminal is ours
    model = load_model(found, dtype)
    model.config.use_cache = True  # training wants it off, answers want it on
    return model.requires_grad_(False).eval().to(device)


def is_global(folder: Path) -> bool:
    """Whether an adapter folder is the result of a merge rather than one client's."""
    return (folder / LEDGER_NAME).is_file()


def open_adapter(folder: Path) -> PeftFolder:
    """Open an adapter folder by the strict reader: no adapter comes near PEFT that it has not accepted.

    Raises:
        NotFoundError: there is no such folder.
        RefusedError: with every reason.
    """
    if not folder.is_dir():
        raise NotFoundError(f"There is no adapter folder {folder}.")
    try:
        return open_folder(folder)
    except FolderRefused as refused:
        raise RefusedError(refused.problems(str(folder))) from refused


@contextmanager
def open_adapters(folders: Sequence[Path]) -> Iterator[list[PeftFolder]]:
    """Open adapter folders, and close them when the block ends.

    Raises:
        NotFoundError: one is not there.
        RefusedError: with every reason of every one that is refused.
    """
    opened: list[PeftFolder] = []
    problems: list[Problem] = []
    try:
        for folder in folders:
            try:
                opened.append(open_adapter(folder))
            except RefusedError as refused:
                problems += refused.problems
        if problems:
            raise RefusedError(problems)
        yield opened
    finally:
        for adapter in opened:
            adapter.close()


def attach(base: Any, adapter: PeftFolder) -> Any:
    """A model that computes the base with the adapter on it; the base stays as it was.

    The tree of modules is copied and its matrices are shared. What PEFT would write into the model that it is given
    is copied too: vectors (an adapter may have trained the biases), and tensors that the adapter holds whole.

    Raises:
        RefusedError: the adapter does not fit the base.
    """
    whole = {name for name, spec in adapter.specs.items() if isinstance(spec, FullSpec)}
    named = list(base.named_parameters(remove_duplicate=False))
    written = {id(parameter) for name, parameter in named if name in whole or parameter.ndim < 2}
    memo = {id(parameter): parameter for _, parameter in named if id(parameter) not in written}
    return attach_in_place(copy.deepcopy(base, memo), adapter).get_base_model()


def attach_in_place(model: Any, adapter: PeftFolder) -> Any:
    """`model` itself with the adapter on it, in PEFT's wrapper; every tensor of the adapter is in its place.

    Raises:
        RefusedError: the adapter does not fit the model, or holds NaN or infinity.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT comments on tied weights and the like; what matters is checked below
        try:
            names = [name for stored in adapter.stored.values() for name in stored.tensors.values()]
            tensors = {name: adapter.file.read(name) for name in names}
            wrapped = get_peft_model(model, peft_config(adapter))
            result = set_peft_model_state_dict(wrapped, tensors)
        except (ValueError, RuntimeError) as error:
            raise _refused(adapter, str(error).strip().splitlines()[-1].strip()) from error
    if result.unexpected_keys:
        raise _refused(adapter, f"the base has no place for {result.unexpected_keys[0].removeprefix(PREFIX)}")
    if empty := _unfilled(wrapped, set(result.missing_keys)):
        raise _refused(adapter, f"holds nothing for {empty[0].removeprefix(PREFIX)}")
    return wrapped.requires_grad_(False).eval()


def _unfilled(wrapped: Any, missing: set[str]) -> list[str]:
    """The adapter's parameters that no tensor went into; a tied one is filled under its other name."""
    parameters = dict(wrapped.named_parameters(remove_duplicate=False))
    filled = {id(parameter) for name, parameter in parameters.items() if name not in missing}
    mine = [name for name in parameters if ".default" in name and name in missing]
    return [name for name in mine if id(parameters[name]) not in filled]


def peft_config(adapter: PeftFolder) -> "LoraConfig":
    """A LoraConfig made of the accepted fields alone, with each module's own rank and alpha: never the file's own."""
    from peft import LoraConfig

    specs = adapter.specs
    modules = {name: spec for name, spec in specs.items() if isinstance(spec, FactorsSpec)}
    tokens = {
        name.removesuffix(TOKEN_SUFFIX): spec.indices for name, spec in specs.items() if isinstance(spec, TokenSpec)
    }
    whole = [name for name, spec in specs.items() if isinstance(spec, FullSpec)]
    config = merged_config([adapter.config], modules, tokens, whole)
    config |= {"task_type": "CAUSAL_LM"}
    return LoraConfig(**{key: value for key, value in config.items() if key != "peft_type"})


def _refused(adapter: PeftFolder, reason: str) -> RefusedError:
    hint = "Was it trained on another base model?"
    return RefusedError([Problem(str(adapter.folder), "adapter_model.safetensors", reason)], hint=hint)
