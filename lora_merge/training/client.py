"""The end of a run: the adapter folder with the client's statement, written beside and renamed."""

import json
import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from lora_merge import __version__
from lora_merge.checkpoint.folder import atomic_folder
from lora_merge.errors import ConflictError
from lora_merge.recipe import LoadedRecipe
from lora_merge.statement import FILE_NAME, BaseModel, RecipeRef, Statement
from lora_merge.training.fit import Fitted
from lora_merge.training.job import Job, is_main_process, remove_checkpoints


@dataclass(frozen=True)
class Trained:
    """A finished client: its folder, its statement, and what the run did."""

    output: Path
    statement: Statement
    fitted: Fitted


def write_client(
    model: Any,
    base: BaseModel,
    num_examples: int,
    fitted: Fitted,
    loaded: LoadedRecipe,
    job: Job,
    started: datetime,
) -> Trained:
    """Write the client's adapter folder: `adapter_config.json`, `adapter_model.safetensors`, `lora_merge.json`.

    The folder appears whole, by one rename, or not at all.

    Raises:
        ConflictError: somebody else has made the output in the meantime; what was trained lies beside it.
        StorageError: the disk is full or not writable.
    """
    # A run of few steps may not have come to every row; the client's weight counts those that it learnt from.
    steps, batch = fitted.steps, loaded.recipe.batch_size
    learnt = min(num_examples, steps * batch)
    if learnt < num_examples:
        came = f"{steps} steps of {batch} rows came to {learnt} of the {num_examples} examples"
        job.tell(f"{job.client_id}: {came}: the adapter states {learnt}")
    statement = Statement(
        client_id=job.client_id,
        base_model=base,
        num_examples=learnt,
        recipe=RecipeRef(loaded.name, loaded.digest, loaded.recipe.prompt_form, dict(loaded.overrides)),
        local_epochs=fitted.epochs,
        steps=steps,
        tokens=fitted.tokens,
        seed_lora_A=loaded.recipe.seed_lora_A,
        trained_at={"start": _second(started), "end": _second(datetime.now(UTC))},
        versions=_versions(),
    )
    if is_main_process():
        _write(model, base, statement, job)
    return Trained(job.output, statement, fitted)


def _write(model: Any, base: BaseModel, statement: Statement, job: Job) -> None:
    config = json.dumps(_config(model, base), indent=2, sort_keys=True) + "\n"

    def write(output: Path, *, force: bool = False) -> None:
        with atomic_folder(output, force=force, kind="client", looked=True, tell=job.tell) as folder:
            _write_weights(model, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(config, encoding="utf-8")
            (folder / FILE_NAME).write_text(statement.to_json(), encoding="utf-8")

    try:
        write(job.output, force=job.force)
    except ConflictError as error:
        beside = _free_beside(job.output)
        write(beside)
        remove_checkpoints(job)  # the run is over: there is nothing to go on with
        error.hint = f"It is left as it is. What was trained is whole, and lies in {beside}; --resume is not needed."
        raise


def _free_beside(output: Path) -> Path:
    """The first of `output-2`, `output-3`, … that is not there."""
    names = (output.with_name(f"{output.name[:60]}-{number}") for number in count(2))
    return next(path for path in names if not os.path.lexists(path))


def _write_weights(model: Any, path: Path) -> None:
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in state.items()}
    # Not `save_file`, which makes the file readable for its owner only.
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def _config(model: Any, base: BaseModel) -> dict[str, Any]:
    """PEFT's own config, with the base's repository in place of the folder it was read from."""
    config = dict(model.peft_config["default"].to_dict())
    config |= {
        "base_model_name_or_path": base.repo,
        "revision": base.commit,
        "inference_mode": True,
        "target_modules": sorted(config["target_modules"]),
        "peft_type": "LORA",
    }
    for never in ("auto_mapping", "megatron_core", "megatron_config"):
        config.pop(never, None)
    # Entries that say nothing are left out: an older PEFT would warn of those it does not know yet.
    return {key: value for key, value in config.items() if value is not None and value != {}}


def _second(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"lora_merge": __version__, "python": platform.python_version(), **packages}
