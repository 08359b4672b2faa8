"""A job: what one client brings to a recipe, checked before anything heavy is loaded."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_merge.errors import NotFoundError, UsageError
from lora_merge.recipe import LoadedRecipe
from lora_merge.statement import FILE_NAME, StatementError, check_client_id

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
        return self.output.parent / f".{self.output.name}.training"


def check_job(job: Job) -> None:
    """Refuse what cannot work, before rows are read or a model is loaded.

    Raises:
        UsageError: the client id is malformed, or the output is taken.
        NotFoundError: there is no data.
    """
    try:
        check_client_id(job.client_id)
    except StatementError as error:
        raise UsageError(f"--client-id {job.client_id}: {error.reason}.") from error
    if Path(job.data).suffix and not Path(job.data).exists():
        raise NotFoundError(f"There is no data file {job.data}.")
    if not job.output.exists() and not job.output.is_symlink():
        return
    if not job.output.is_dir() or job.output.is_symlink():
        raise UsageError(f"{job.output} is there and is not a folder.")
    strangers = sorted({entry.name for entry in job.output.iterdir()} - set(ADAPTER_FILES))
    if strangers:
        raise UsageError(f"{job.output} holds other files ({strangers[0]}): name a new folder.")
    if any(job.output.iterdir()) and not (job.force or (job.resume and job.work.is_dir())):
        raise UsageError(f"{job.output} already holds an adapter.", hint="--force trains it anew and replaces it.")


def open_work(job: Job, loaded: LoadedRecipe) -> Path | None:
    """Make the work folder, or take up the one that an interrupted run left; returns its last checkpoint.

    Raises:
        UsageError: the folder is of another run: its recipe, data or client differ.
    """
    mark = json.dumps(_fingerprint(job, loaded), sort_keys=True, indent=2)
    marked = job.work / "job.json"
    if not job.resume and job.work.exists():
        shutil.rmtree(job.work)
    if marked.is_file() and marked.read_text(encoding="utf-8") != mark:
        raise UsageError(
            f"{job.work} holds the checkpoint of another run: its recipe, --set, data or client id differ.",
            hint="Leave out --resume to start anew.",
        )
    job.work.mkdir(parents=True, exist_ok=True)
    marked.write_text(mark, encoding="utf-8")
    checkpoints = sorted(job.work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    if job.resume:
        job.tell(f"Resuming at step {checkpoints[-1].name.rpartition('-')[2]}" if checkpoints else "Nothing to resume")
    return checkpoints[-1] if checkpoints else None


def close_work(job: Job) -> None:
    """Remove the work folder: the run is done."""
    shutil.rmtree(job.work, ignore_errors=True)


def _fingerprint(job: Job, loaded: LoadedRecipe) -> dict[str, str]:
    data = Path(job.data)
    content = hashlib.sha256(data.read_bytes()).hexdigest() if data.is_file() else job.data
    return {"recipe": loaded.recipe.digest(), "data": content, "client_id": job.client_id}
