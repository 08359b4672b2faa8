"""Whether adapters belong to a base model, before it is loaded: the hash that they state, the shapes that they need."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lora_merge.adapter import FactorsSpec, FullSpec, Spec
from lora_merge.checkpoint.base_model import shape_text
from lora_merge.checkpoint.federation import base_name
from lora_merge.checkpoint.peft_folder import PeftFolder
from lora_merge.errors import Problem, RefusedError
from lora_merge.evaluation.models import attach_in_place, record_in
from lora_merge.kept import ClaimsError, descriptions_of
from lora_merge.sources.base_models import FoundBase, weights_sha256
from lora_merge.statement import Statement
from lora_merge.training.base_model import skeleton


def require_belonging(found: FoundBase, adapters: Sequence[PeftFolder], warn: Callable[[str], None]) -> None:
    """Refuse adapters that cannot be put on the base, and warn of those that were trained on other weights.

    Other weights are no refusal: the hash is that of files, and the same model in another type or cut into other files
    has another one. Whoever names the base by hand may mean just that.

    Raises:
        RefusedError: with every tensor of every adapter that the base has no place for, or one of another shape; or a
            merged adapter's record is malformed.
    """
    _warn_of_other_weights(found, adapters, warn)
    model = skeleton(found)
    problems = [problem for adapter in adapters for problem in _misfits(model, found, adapter)]
    if problems:
        raise RefusedError(
            problems, hint="Was it trained on another base model? Give --base the one that it belongs to."
        )


def _warn_of_other_weights(found: FoundBase, adapters: Sequence[PeftFolder], warn: Callable[[str], None]) -> None:
    stated = {adapter.folder: hashes for adapter in adapters if (hashes := _stated_hashes(adapter))}
    here = weights_sha256(found.folder) if stated else None
    if others := [str(folder) for folder, hashes in stated.items() if hashes != {here}]:
        warn(f"{', '.join(others)}: trained on other base weights than those of {found.folder}.")


def _stated_hashes(adapter: PeftFolder) -> set[str]:
    """The sha256 of the base's weights by the client's own statement, or by those of the clients of a merged one."""
    statements = [adapter.statement, *_statements_of_clients(adapter)]
    return {each.base_model.weights_sha256 for each in statements if each and each.base_model.weights_sha256}


def _statements_of_clients(adapter: PeftFolder) -> list[Statement | None]:
    record = record_in(adapter.folder)
    if record is None:
        return []
    try:
        return [each.statement for each in descriptions_of(record.contributions).values()]
    except ClaimsError as error:
        problem = Problem(str(adapter.folder), f"aggregation.json, {error.field}", error.reason)
        raise RefusedError([problem]) from error


def _misfits(model: Any, found: FoundBase, adapter: PeftFolder) -> Iterator[Problem]:
    """What the base has no place for, or one of another shape."""
    absent = list[str]()
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters(remove_duplicate=False)}
    modules = {name for name, _ in model.named_modules()}
    for name, spec in adapter.specs.items():
        tensor = base_name(name, spec)
        shape = shapes.get(tensor)
        if shape is not None:
            needed, fits = _needed(spec, shape)
            if not fits:
                yield Problem(str(adapter.folder), name, f"needs {needed}, and the base model has {shape_text(shape)}")
        elif tensor.rpartition(".")[0] not in modules:
            absent.append(name)
    if absent and not _finds_places(skeleton(found), adapter):
        yield from (Problem(str(adapter.folder), name, "the base model has no such module") for name in absent)


def _finds_places(model: Any, adapter: PeftFolder) -> bool:
    """Whether PEFT has a place for all: it renames some modules as it loads them, such as Mixtral's old experts."""
    try:
        attach_in_place(model, adapter)
    except RefusedError:
        return False
    return True


def _needed(spec: Spec, shape: tuple[int, ...]) -> tuple[str, bool]:
    """The shape that an update needs of the base, and whether the base's is that."""
    if isinstance(spec, FullSpec):
        return shape_text(spec.shape), spec.shape == shape
    if isinstance(spec, FactorsSpec):
        pair = (spec.d_out, spec.d_in)
        # Embeddings and Conv1D are stored transposed; of convolutions and experts, PEFT knows more than the shape does.
        return shape_text(pair), shape in (pair, pair[::-1]) or len(shape) != 2 or spec.blocks > 1
    rows = max(spec.indices, default=-1) + 1
    return f"{rows} rows of {spec.d} numbers", len(shape) == 2 and rows <= shape[0] and spec.d == shape[1]
