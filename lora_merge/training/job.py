"""A job: what one client brings to a recipe, checked before anything heavy is loaded."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_merge.checkpoint.folder import alone_beside, check_free, hidden_name, in_parents, new_parents, write_file
from lora_merge.environment import device_kind
from lora_merge.errors import ConflictError, NotFoundError, UsageError
from lora_merge.recipe import LoadedRecipe
from lora_merge.statement import FILE_NAME, BaseModel, StatementError, check_client_id
from lora_merge.training.records import check_data

_MARK = "run.json"
DEVICES = ("cpu", "cuda", "mps")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", FILE_NAME)


@dataclass(frozen=True)
class Step:
    """Where a run is, after an optimiser step. `tokens_per_second` and `seconds_left` are of this process."""

    step: int
    steps: int
    loss: float
    tokens: int
    tokens_per_second: float
    seconds_left: float


def _silent(_: Any) -> None:
    return None


@dataclass(frozen=True)
class Job:
    """One client's part of a run.

    Attributes:
        data: the client's rows: a file, or what `datasets` can read.
        client_id: `org/name`.
        output: the adapter folder to make.
        base: a folder with the base model's weights; None is the Hub.
        device: auto, cpu, cuda, cuda:N or mps.
        resume: go on from the last checkpoint beside `output`.
        force: replace an adapter that is already at `output`.
        tell: takes a line of talk.
        on_step: takes each `Step`.
    """

    data: str
    client_id: str
    output: Path
    base: Path | None = None
    device: str = "auto"
    resume: bool = False
    force: bool = False
    tell: Callable[[str], None] = _silent
    on_step: Callable[[Step], None] = _silent

    @property
    def work(self) -> Path:
        """The hidden folder beside the output that holds checkpoints while the run lasts."""
        output = Path(os.path.abspath(self.output))
        return output.parent / hidden_name(output, "training")


def check_job(job: Job) -> None:
    """Refuse what cannot work, before rows are read or a model is loaded.

    Raises:
        UsageError: the client id is malformed, the data or the device is of no known kind, or the output is taken.
        NotFoundError: there is no data, or no folder with the base model.
        ConflictError: another run trains into the same output at this moment.
    """
    try:
        check_client_id(job.client_id)
    except StatementError as error:
        raise UsageError(f"--client-id {job.client_id}: {error.reason}.") from error
    device_kind(job.device, DEVICES)
    check_data(job.data)
    if job.base is not None and not job.base.is_dir():
        raise NotFoundError(f"--base {job.base}: there is no such folder.")
    _check_output(job)


@contextmanager
def work_folder(job: Job, loaded: LoadedRecipe, base: BaseModel) -> Iterator[Path | None]:
    """Make the work folder, or take up the one that an interrupted run left; yields its last checkpoint.

    It is removed when the block ends well. Otherwise it stays if there is a checkpoint in it to go on from. Meanwhile
    no other run has it: two would write into each other's checkpoints, and a `--resume` would go on with the wrong one.

    Raises:
        UsageError: the checkpoint is of another run: its recipe, base, data or client differ.
        ConflictError: another run trains into the same output at this moment.
        StorageError: the disk is full or not writable.
    """
    mark, marked = _mark(job, loaded, base), job.work / _MARK
    if not is_main_process():
        yield last_checkpoint(job) if job.resume else None
        return
    with _only_run(job):
        checkpoint = last_checkpoint(job) if job.resume else None
        if checkpoint and not (marked.is_file() and marked.read_text(encoding="utf-8") == mark):
            raise UsageError(
                f"{job.work} is of another run: its recipe, --set, base model, data or client id differ.",
                hint="--force in place of --resume starts anew.",
            )
        if not checkpoint:
            remove_checkpoints(job)
            write_file(marked, mark)
        if job.resume:
            job.tell(f"Going on from {checkpoint.name}" if checkpoint else "No checkpoint to go on from: starting anew")
        yield checkpoint
        remove_checkpoints(job)


@contextmanager
def _only_run(job: Job) -> Iterator[None]:
    """Hold the work folder: made where there is none, removed at the end where no checkpoint is in it.

    A killed run's lock is gone with it.
    """
    with new_parents(job.work):
        lock = in_parents(job.work, partial(_take, job))
        try:
            yield
        finally:
            if last_checkpoint(job) is None:
                with alone_beside(job.work, job.tell):
                    shutil.rmtree(job.work, ignore_errors=True)
            os.close(lock)


def _take(job: Job) -> int:
    """Make the work folder where there is none; the descriptor of the lock on it."""
    with alone_beside(job.work, job.tell):  # or it could be removed while we open it
        job.work.mkdir(exist_ok=True)
        return _locked(job)


def _locked(job: Job) -> int:
    """The descriptor of the lock on the work folder, which is there."""
    lock = os.open(job.work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConflictError(
            f"Another run trains into {job.output} at this moment.",
            hint="Wait until it ends, or name another --output.",
        ) from None
    return lock


def remove_checkpoints(job: Job) -> None:
    """Remove what an interrupted run would go on from."""
    for folder in job.work.glob("checkpoint-*"):
        shutil.rmtree(folder, ignore_errors=True)


def is_main_process() -> bool:
    """Whether this is the one of torchrun's processes that writes; without torchrun, there is but one."""
    return os.environ.get("RANK", "0") == "0"


def last_checkpoint(job: Job) -> Path | None:
    """The newest whole checkpoint of an interrupted run. One that was cut off has no readable state."""
    for folder in sorted(job.work.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name[11:]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return folder
    return None


def _check_output(job: Job) -> None:
    if is_main_process() and job.work.is_dir():
        os.close(_locked(job))  # the checkpoints of a live run are nobody's to go on with, or to drop
    waiting = last_checkpoint(job) is not None
    if waiting and not (job.resume or job.force):
        raise UsageError(
            f"An interrupted run is waiting beside {job.output}.",
            hint="--resume goes on with it; --force drops it and starts anew.",
        )
    is_there = os.path.lexists(job.output)
    if is_there and (not job.output.is_dir() or job.output.is_symlink()):
        raise UsageError(f"{job.output} is there and is not a folder.")
    there = sorted(entry.name for entry in job.output.iterdir()) if is_there else []
    if strangers := [name for name in there if name not in ADAPTER_FILES]:
        raise UsageError(f"{job.output} holds other files ({strangers[0]}): name a new folder.")
    if there and not job.force:
        way = "--resume --force goes on with it" if waiting else "--force trains it anew"
        raise UsageError(f"{job.output} already holds an adapter.", hint=f"{way} and replaces it.")
    check_free(job.output, force=True, kind="client")  # now, and not after hours of training


def _mark(job: Job, loaded: LoadedRecipe, base: BaseModel) -> str:
    """What must not change between a run and its `--resume`."""
    data = Path(job.data)
    content = hashlib.sha256(data.read_bytes()).hexdigest() if data.is_file() else job.data
    facts = {"recipe": loaded.recipe.digest(), "base": base.weights_sha256, "data": content, "client": job.client_id}
    return json.dumps(facts, indent=2)
