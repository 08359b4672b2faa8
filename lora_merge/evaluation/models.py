"""The models that are compared: the base, read once, and each adapter on a tree that shares the base's matrices."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_merge.adapter import FactorsSpec, FullSpec, TokenSpec, is_frozen
from lora_merge.checkpoint.federation import base_name
from lora_merge.checkpoint.layout import PREFIX, TOKEN_SUFFIX
from lora_merge.checkpoint.peft_folder import LEDGER_NAME, FolderRefused, PeftFolder, open_folder, read_ledger
from lora_merge.checkpoint.safetensors_file import FileRefused
from lora_merge.checkpoint.writer import merged_config
from lora_merge.errors import Problem, RefusedError
from lora_merge.hub.waiting import MAX_WAIT
from lora_merge.ledger import Ledger
from lora_merge.sources.base_models import FoundBase
from lora_merge.sources.reference import Advance, Tell
from lora_merge.sources.rooms import open_rooms
from lora_merge.training.base_model import load_model

if TYPE_CHECKING:
    from peft import LoraConfig


def silent(label: str, total: int, unit: str) -> AbstractContextManager[Advance]:
    """A progress that nobody sees."""
    return nullcontext(lambda steps: None)


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


def record_in(folder: Path) -> Ledger | None:
    """The record of the merge that an adapter folder is the result of; None of one client's.

    Raises:
        RefusedError: it is malformed.
    """
    if not is_global(folder):
        return None
    try:
        return read_ledger(folder)
    except FileRefused as error:
        raise RefusedError([Problem(str(folder), error.field, error.reason)]) from error


@dataclass(frozen=True)
class Opened:
    """An accepted adapter and where it came from: a repository's id, or a folder's path."""

    adapter: PeftFolder
    place: str

    @property
    def name(self) -> str:
        """What the client says that it is called; else its folder's name, or its repository."""
        if self.adapter.statement:
            return self.adapter.statement.client_id
        return self.adapter.folder.name if self.place == str(self.adapter.folder) else self.place


@contextmanager
def open_adapters(sources: Sequence[str | Path], *, tell: Tell, max_wait: float = MAX_WAIT) -> Iterator[list[Opened]]:
    """Open the adapters that sources name, as `aggregate` takes them, and close them when the block ends.

    Raises:
        NotFoundError: one is not there, or may not be read.
        RefusedError: with every reason of every one that is refused.
        NetworkError: the Hub cannot be reached.
    """
    with open_rooms(max_wait, tell) as rooms, ExitStack() as stack:
        candidates = rooms.examine(rooms.expand(sources))
        folders = rooms.fetch(candidates, silent)
        for note in rooms.notes:
            tell(note)
        opened, problems = [], list[Problem]()
        for candidate, folder in zip(candidates, folders, strict=True):
            try:
                adapter = stack.enter_context(closing(open_folder(folder)))
                opened.append(Opened(adapter, candidate.ref.place))
            except FolderRefused as refused:
                problems += refused.problems(candidate.ref.place)
        if problems:
            raise RefusedError(problems)
        yield opened


def attach(base: Any, adapter: PeftFolder) -> Any:
    """A model that computes the base with the adapter on it; the base stays as it was.

    The tree of modules is copied and its matrices are shared. What PEFT would write into the model that it is given
    is copied too: vectors (an adapter may have trained the biases), and tensors that the adapter holds whole.

    Raises:
        RefusedError: the adapter does not fit the base.
    """
    whole = {base_name(name, spec) for name, spec in adapter.specs.items() if isinstance(spec, FullSpec)}
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

    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT comments on tied weights and the like; what matters is checked below
        try:
            names = [name for stored in adapter.stored.values() for name in stored.tensors.values()]
            tensors = {name: adapter.file.read(name) for name in names}
            wrapped = get_peft_model(model, peft_config(adapter))
            result = set_peft_model_state_dict(wrapped, tensors)
        except (ValueError, RuntimeError) as error:
            raise _refused(adapter, str(error).strip().splitlines()[-1].strip()) from error
    # PEFT saves a head itself, frozen, beside its LoRA, and has it elsewhere where the head has token rows too.
    frozen = [(name, each) for name, each in adapter.stored.items() if is_frozen(each.spec)]
    elsewhere = {each.tensors["value"] for name, each in frozen if base_name(name, each.spec) in own}
    if homeless := [name for name in result.unexpected_keys if name not in elsewhere]:
        raise _refused(adapter, f"the base has no place for {homeless[0].removeprefix(PREFIX)}")
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
