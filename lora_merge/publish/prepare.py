"""From an adapter folder to the files to publish: accepted by the strict reader, carded, scanned for secrets."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from yaml import YAMLError

from lora_merge.agreement import is_local
from lora_merge.card.card import client_card, completed_card, global_card
from lora_merge.card.merged import Place, private_inputs
from lora_merge.checkpoint.intact import WAY_ON, alterations
from lora_merge.checkpoint.peft_folder import CONFIG_NAME, FolderRefused, PeftFolder, open_folder
from lora_merge.checkpoint.safetensors_file import FileRefused, parse_json
from lora_merge.errors import NotFoundError, Problem, Refusals, RefusedError
from lora_merge.kept import paths_in
from lora_merge.ledger import FILE_NAME as LEDGER_NAME
from lora_merge.ledger import Ledger
from lora_merge.ledger_form import LedgerError
from lora_merge.lock import FILE_NAME as LOCK_NAME
from lora_merge.lock import Lock, LockError
from lora_merge.publish.files import (
    CARD_NAME,
    PublishedFile,
    RecordFile,
    WeightsFile,
    left_out,
    read_records,
    weights_files,
)
from lora_merge.publish.results import read_results
from lora_merge.publish.secrets import Secret, find_paths, find_secrets

# Where a base model is named: `_require_repository_as_base` says what to write there instead of a path.
_BASE_NAME = re.compile(
    r"adapter_config\.json, base_model_name_or_path|lora_merge\.json, base_model\.repo|lora-merge\.lock, base_model"
    r"|aggregation\.json, (?:base_model|contributions\.\d+\.claims\.base_model_name_or_path)"
)
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


@dataclass(frozen=True)
class Prepared:
    """An adapter that may be published: its files, what is left out, and what the user should know of it."""

    files: Sequence[PublishedFile]
    left_out: Sequence[str]
    warnings: Sequence[str]


def prepare(
    folder: Path,
    repo: str,
    *,
    evaluation: Path | None = None,
    own: Mapping[str, str] | None = None,
    count_private: Callable[[Sequence[str]], int | None] = lambda repos: None,
) -> Prepared:
    """The files of `folder` to publish as `repo`. Nothing is written.

    Args:
        evaluation: what `lora-merge evaluate --json` printed; goes into the card.
        own: texts that must not get out whatever their form, by kind (see `find_secrets`).
        count_private: how many of the repositories that a merge came from are private; None where that is not known.

    Raises:
        NotFoundError: there is no such folder, or no such evaluation.
        RefusedError: it is not an adapter that we accept, or it holds a secret or a path of this machine.
        UsageError: the evaluation is not one, or not of this adapter.
    """
    if not folder.is_dir():
        raise NotFoundError(f"There is no folder {folder}.", hint="lora-merge push DIR ORG/NAME")
    refusals = Refusals()
    adapter: PeftFolder | None = None
    ledger: Ledger | None = None
    records: dict[str, bytes] = {}
    weights: list[WeightsFile] = []
    with ExitStack() as stack:
        with refusals.noted():
            adapter = stack.enter_context(closing(_accepted(folder)))
        with refusals.noted():
            records = read_records(folder)
        written = dict(records)
        with refusals.noted():
            ledger = _ledger(folder, records)
        with refusals.noted():
            weights = list(weights_files(folder))
            if ledger is not None:
                _require_intact(folder, ledger, records, weights)
        pinned = sorted({entry.source for entry in ledger.contributions if entry.commit}) if ledger else []
        place = Place(repo, LOCK_NAME in records, count_private(pinned) if pinned else None)
        if adapter is not None:
            with refusals.noted():
                _require_repository_as_base(adapter, ledger)
            with refusals.noted():
                records[CARD_NAME] = _card(adapter, ledger, records.get(CARD_NAME), place, evaluation).encode()
        with refusals.noted():
            texts = {**records, **{file.name: file.header() for file in weights}}
            with refusals.noted():
                _require_no_secrets(folder, texts, written.get(CARD_NAME), own or {})
            _require_no_paths(folder, texts)
        refusals.require_none()
        assert adapter is not None
        files: list[PublishedFile] = [*(RecordFile(name, content) for name, content in records.items()), *weights]
        return Prepared(files, left_out(folder), list(_warnings(adapter, ledger, place)))


def _accepted(folder: Path) -> PeftFolder:
    try:
        return open_folder(folder)
    except FolderRefused as error:
        raise RefusedError(error.problems(str(folder))) from error


def _ledger(folder: Path, records: Mapping[str, bytes]) -> Ledger | None:
    """The ledger of a merged adapter, strictly read; its lock is too, so that nobody finds a broken one later."""
    name = LEDGER_NAME
    try:
        ledger = Ledger.from_json(parse_json(records[name], name)) if name in records else None
        name = LOCK_NAME
        if name in records:
            Lock.from_json(parse_json(records[name], name))
        return ledger
    except (FileRefused, LedgerError, LockError) as error:
        raise RefusedError([Problem(str(folder), f"{name}, {error.field}", error.reason)]) from error


def _require_intact(folder: Path, ledger: Ledger, records: Mapping[str, bytes], weights: Sequence[WeightsFile]) -> None:
    """Raise `RefusedError` where a merged adapter is not what its merge wrote."""
    small = {name: hashlib.sha256(content).hexdigest() for name, content in records.items() if name == CONFIG_NAME}
    found = small | {file.name: file.sha256 for file in weights}
    if problems := [Problem(str(folder), name, reason) for name, reason in alterations(ledger, found)]:
        raise RefusedError(problems, hint=WAY_ON)


def _require_repository_as_base(adapter: PeftFolder, ledger: Ledger | None) -> None:
    stated = adapter.statement.base_model.repo if adapter.statement else None
    names = {
        "adapter_config.json, base_model_name_or_path": adapter.config.base_model,
        "lora_merge.json, base_model.repo": stated,
        "aggregation.json, base_model": ledger.base_model if ledger else None,
    }
    problems = [
        Problem(str(adapter.folder), field, "is a path on this machine, or a name that the Hub cannot have")
        for field, name in names.items()
        if name and not _REPOSITORY.fullmatch(name)
    ] or [
        Problem(str(adapter.folder), field, f"{name} is a folder here too, so it may be either")
        for field, name in names.items()
        if name and name != stated and Path(name).is_dir()
    ]
    paths = paths_in(ledger.contributions) if ledger else []
    problems += [
        Problem(
            str(adapter.folder), "aggregation.json, contributions", f"the base model of {client} is named by a path"
        )
        for client in paths
    ]
    if problems:
        hint = "Write the base model's repository id there, as in org/model: only you know which one it is."
        if ledger is not None:
            hint = "Write the base model's repository id, as in org/model, into its clients' files and merge them anew."
        raise RefusedError(problems, hint=hint)


def _card(
    adapter: PeftFolder, ledger: Ledger | None, there: bytes | None, place: Place, evaluation: Path | None
) -> str:
    """The card of the records; one that somebody wrote by hand keeps its text."""
    base, task = adapter.config.base_model, adapter.config.task_type
    client = adapter.statement.client_id if adapter.statement else None
    kind = "global" if ledger else "local"
    results = read_results(evaluation, kind=kind, name=None if ledger else client) if evaluation else None
    if ledger is None:
        ours = client_card(adapter.statement, base_model=base, task_type=task, repo=place.repo or "", results=results)
        unnamed = None
    else:
        ours = global_card(ledger, task_type=task, base_is_local=False, place=place, results=results)
        unnamed = global_card(ledger, task_type=task, base_is_local=is_local(ledger.base_model or ""))
    if there is None or there == (unnamed or "").encode():
        return ours
    try:
        return completed_card(there.decode("utf-8-sig"), ours)
    except (ValueError, YAMLError, RecursionError) as error:
        reason = "is not a model card: its metadata is not YAML, or it is not UTF-8"
        raise RefusedError([Problem(str(adapter.folder), CARD_NAME, reason)]) from error


def _require_no_secrets(folder: Path, texts: Mapping[str, bytes], card: bytes | None, own: Mapping[str, str]) -> None:
    """Raise `RefusedError` with every secret in `texts`; `card` is the model card as it lies there."""
    found = {name: _secrets(content, own) for name, content in texts.items()}
    if card is not None and CARD_NAME in found:
        kinds = {secret.kind for secret in found[CARD_NAME]}
        there = [secret for secret in _secrets(card, own) if secret.kind in kinds]
        known = {secret.kind for secret in there}
        found[CARD_NAME] = there + [secret for secret in found[CARD_NAME] if secret.kind not in known]
    problems = [
        Problem(str(folder), f"{name}, line {secret.line}", f"holds {secret.kind}")
        for name, secrets in found.items()
        for secret in secrets
    ]
    if problems:
        hint = "Take it out of the file. A token or a key that was about to be published is best revoked too."
        raise RefusedError(problems, hint=hint)


def _require_no_paths(folder: Path, texts: Mapping[str, bytes]) -> None:
    """Raise `RefusedError` with every entry of a record, or of a tensor file's header, that holds an absolute path."""
    fields = [f"{name}, {place}" for name, content in texts.items() for place in find_paths(_text(content))]
    reason = "holds a path on somebody's machine"
    if problems := [Problem(str(folder), field, reason) for field in fields if not _BASE_NAME.fullmatch(field)]:
        raise RefusedError(problems, hint="Take the path out of the file, or write there what it means to others.")


def _secrets(content: bytes, own: Mapping[str, str]) -> list[Secret]:
    return find_secrets(_text(content), own)


def _text(content: bytes) -> str:
    return content.decode("utf-8", errors="replace")


def _warnings(adapter: PeftFolder, ledger: Ledger | None, place: Place) -> Iterator[str]:
    if ledger and place.private_inputs:
        yield private_inputs(place.private_inputs, len(ledger.contributions))
    if not adapter.config.base_model:
        yield "adapter_config.json names no base model, so nobody will know what this adapter belongs to."
