"""What must hold of a mutant: it is refused by a documented error, or what was accepted is finite and consistent."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file

from lora_merge import aggregate
from lora_merge.adapter import FactorsSpec, FullSpec, spec_of
from lora_merge.aggregation.methods import METHODS
from lora_merge.agreement import is_local
from lora_merge.card.card import client_card, global_card
from lora_merge.card.merged import Place
from lora_merge.checkpoint.config import MAX_R, MAX_SCALING
from lora_merge.checkpoint.core_file import open_core
from lora_merge.checkpoint.layout import stored_shapes
from lora_merge.checkpoint.peft_folder import FolderRefused, PeftFolder, open_folder
from lora_merge.checkpoint.safetensors_file import FileRefused, parse_json
from lora_merge.errors import LoraMergeError, RefusedError
from lora_merge.folding.global_adapter import opened_global
from lora_merge.folding.onto import fold
from lora_merge.kept import ClaimsError, descriptions_of
from lora_merge.ledger import Ledger
from lora_merge.ledger_form import LedgerError
from lora_merge.lock import Lock, LockError
from tests.adapters import WEIGHTS

CORE_RANK = 2  # of the merges that have a core
MODULES = 200  # a merge takes its time by the module
REFUSED = (FolderRefused, FileRefused, LedgerError, LockError)


def judge_folder(random: Random, folder: Path, peer: Path, scratch: Path) -> str:
    """Open an adapter folder, read it, and merge it, alone or with the sound `peer`."""
    try:
        adapter = open_folder(folder)
    except FolderRefused:
        return "refused"
    try:
        read = _consistent(adapter)
        if adapter.statement is not None:
            text = client_card(adapter.statement, base_model=adapter.config.base_model, task_type=None, repo="org/x")
            _harmless(text)
            assert type(adapter.statement).from_json(json.loads(adapter.statement.to_json())) == adapter.statement
    finally:
        adapter.close()
    if not read:
        return "accepted; a tensor refused when it was read"
    if len(adapter.stored) > MODULES:
        return "accepted; of more modules than are merged here"
    return _merged(random, folder, peer, scratch)


def _consistent(adapter: PeftFolder) -> bool:
    """Whether all tensors are finite; asserts that the description is that of the header, tensor by tensor."""
    described: dict[str, tuple[int, ...]] = {}
    for stored in adapter.stored.values():
        if isinstance(stored.spec, FactorsSpec):
            assert 1 <= stored.spec.r <= max(MAX_R, stored.spec.d_in, stored.spec.d_out)
            assert 0 < stored.spec.scaling <= MAX_SCALING
            described |= {stored.tensors[role]: shape for role, shape in stored_shapes(stored.spec).items()}
        elif isinstance(stored.spec, FullSpec):
            described[stored.tensors["value"]] = stored.spec.shape
        else:
            described[stored.tensors["value"]] = (len(stored.spec.indices), stored.spec.d)
    assert described == {name: entry.shape for name, entry in adapter.file.entries.items()}
    try:
        for name in adapter.stored:
            update = adapter[name]
            for value in vars(update).values():
                assert not isinstance(value, torch.Tensor) or torch.isfinite(value).all()
    except FileRefused:
        return False
    return True


def _merged(random: Random, folder: Path, peer: Path, scratch: Path) -> str:
    """Merge by some method; the result is finite, and an adapter that we accept ourselves."""
    alone = random.random() < 0.5
    method = random.choice(["exact", "exact", "svd", *METHODS])
    certificate: Any = random.choice([None, "exact", "probes", "off"])
    try:
        aggregate(
            [folder] if alone else [folder, peer],
            scratch,
            method=method,
            weights="uniform",
            certificate=certificate,
            dtype=random.choice(["fp32", "fp32", "bf16", "fp16"]),
            workers=1,
            force=True,
        )
    except LoraMergeError as error:
        if error.exit_code == 1:
            raise
        return f"accepted; {'alone' if alone else 'beside a sound one'} not merged: {type(error).__name__}"
    _sound(scratch)
    return "accepted and merged"


def _sound(folder: Path) -> None:
    """A result is finite, and all of it is what we accept ourselves."""
    for name, tensor in load_file(folder / WEIGHTS).items():
        assert torch.isfinite(tensor).all(), f"{name} of the result is not finite"
    open_folder(folder).close()
    _harmless((folder / "README.md").read_text(encoding="utf-8"))
    assert judge_ledger((folder / "aggregation.json").read_bytes()) == "accepted"
    assert judge_lock((folder / "lora-merge.lock").read_bytes()) == "accepted"


def judge_ledger(text: bytes) -> str:
    """Read a ledger; what is accepted is written as it was read, and drawn without harm."""
    return _round_trip(text, Ledger, _drawn)


def _drawn(ledger: Any) -> None:
    local = is_local(ledger.base_model or "")
    for place in (None, Place("org/global", has_lock=True, private_inputs=1)):
        _harmless(global_card(ledger, task_type="CAUSAL_LM", base_is_local=local, place=place))
    clients = [contribution.client_id for contribution in ledger.contributions]
    assert len(set(clients)) == len(clients), "a client twice"
    assert all(0 <= contribution.share <= 1 for contribution in ledger.contributions)
    for contribution in ledger.contributions:
        with suppress(ClaimsError):
            descriptions_of([contribution])


def judge_lock(text: bytes) -> str:
    """Read a lock; what is accepted is written as it was read, and differs in nothing from itself."""
    return _round_trip(text, Lock, _same)


def _same(lock: Any) -> None:
    assert lock.differences(lock) == []
    clients = [entry.client_id for entry in lock.inputs]
    assert len(set(clients)) == len(clients), "a client twice"


def judge_global(folder: Path, arrival: Path, base: Path, scratch: Path) -> str:
    """Open a merge with a ledger that was accepted by itself, and fold another client onto it."""
    try:
        with opened_global(folder, "global") as found:
            assert {each.client_id for each in found.ledger.contributions} == found.contributions.keys()
    except RefusedError:
        return "accepted; contradicts the other files"
    return _folded(folder, arrival, base, scratch)


def judge_core(folder: Path, arrival: Path, base: Path, scratch: Path) -> str:
    """Open the core beside a merge, read it, and fold another client into it."""
    with closing(open_folder(folder)) as adapter:
        try:
            core = open_core(adapter, CORE_RANK)
        except FileRefused:
            return "refused"
        with closing(core.file):
            assert core.specs.keys() == adapter.specs.keys()
            try:
                for name in core.specs:
                    assert spec_of(core[name]).d_in == core.specs[name].d_in
                    assert core.dropped(name) >= 0
            except FileRefused:
                read = False
            else:
                read = True
    how = _folded(folder, arrival, base, scratch)
    assert read or not how.startswith("accepted and"), "folded into what could not be read"
    return how


def _folded(folder: Path, arrival: Path, base: Path, scratch: Path) -> str:
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        fold([arrival], folder, output=scratch, base=base, workers=1)
    except LoraMergeError as error:
        if error.exit_code == 1:
            raise
        return f"accepted; not folded onto: {type(error).__name__}"
    _sound(scratch)
    return "accepted and folded onto"


def _round_trip(text: bytes, kind: Any, look: Callable[[Any], None]) -> str:
    try:
        found = kind.from_json(parse_json(text, "file"))
    except REFUSED:
        return "refused"
    written = found.to_json()
    assert kind.from_json(parse_json(written.encode(), "file")).to_json() == written
    assert _holds(parse_json(written.encode(), "file"), parse_json(text, "file")), "not what was read"
    assert all(math.isfinite(number) for number in _numbers(dataclasses.asdict(found)))
    look(found)
    return "accepted"


def _holds(written: Any, read: Any) -> bool:
    """Whether all that was read is written; what was left out is written as its default."""
    if isinstance(read, dict):
        return all(key in written and _holds(written[key], item) for key, item in read.items())
    if isinstance(read, list):
        return len(written) == len(read) and all(map(_holds, written, read))
    return bool(written == read)


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)):
        yield value


def _harmless(text: str) -> None:
    """A card: no control or formatting character, and one front matter that YAML reads."""
    import yaml

    assert all(char == "\n" or char.isprintable() for char in text), "a control character in the card"
    _, front, _ = text.split("---\n", 2)
    assert isinstance(yaml.safe_load(front), dict)
    assert "<script" not in text
