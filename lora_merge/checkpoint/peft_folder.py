"""A client's PEFT folder, opened strictly: config, header, statement; its tensors stay in the file until asked for."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lora_merge.adapter import Spec, Update
from lora_merge.checkpoint.config import MAX_CONFIG_BYTES, MAX_R, AdapterConfig, read_config
from lora_merge.checkpoint.layout import Stored, find_updates
from lora_merge.checkpoint.safetensors_file import FileRefused, SafetensorsFile, open_safetensors, parse_json
from lora_merge.errors import Problem
from lora_merge.statement import FILE_NAME, MAX_BYTES, Statement, StatementError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LEDGER_NAME = "aggregation.json"
# A merged adapter is as wide as its clients together, but never wider than its modules.
MAX_GLOBAL_R = 1 << 17


@dataclass(frozen=True)
class PeftFolder:
    """An accepted adapter folder; an `Adapter` whose updates are read from the file when asked for."""

    folder: Path
    config: AdapterConfig
    statement: Statement | None
    file: SafetensorsFile
    stored: Mapping[str, Stored]

    @cached_property
    def specs(self) -> Mapping[str, Spec]:
        return {name: stored.spec for name, stored in self.stored.items()}

    def __getitem__(self, module: str) -> Update:
        return self.stored[module].load(self.file)

    def sha256(self) -> dict[str, str]:
        """The sha256 of each file that the merge reads, by name."""
        names = [CONFIG_NAME, WEIGHTS_NAME, *([FILE_NAME] if self.statement else [])]
        return {name: file_sha256(self.folder / name) for name in names}

    def close(self) -> None:
        self.file.close()


def open_folder(folder: Path) -> PeftFolder:
    """Open an adapter folder.

    Raises:
        FolderRefused: with every reason to refuse it.
    """
    if (folder / "adapter_model.bin").exists() and not (folder / WEIGHTS_NAME).exists():
        reason = "is a pickle, which can run code when read; only adapter_model.safetensors is accepted"
        raise FolderRefused([FileRefused("adapter_model.bin", reason)])
    is_global = (folder / LEDGER_NAME).exists()
    problems: list[FileRefused] = []
    statement = config = None
    try:
        data = parse_json(_read_small(folder / CONFIG_NAME, MAX_CONFIG_BYTES), CONFIG_NAME)
        config, problems = read_config(data, max_r=MAX_GLOBAL_R if is_global else MAX_R)
    except FileRefused as problem:
        problems.append(problem)
    try:
        statement = read_statement(folder)
    except FileRefused as problem:
        problems.append(problem)
    try:
        file = open_safetensors(folder / WEIGHTS_NAME)
    except FileRefused as problem:
        raise FolderRefused([*problems, FileRefused(f"{WEIGHTS_NAME}, {problem.field}", problem.reason)]) from None
    except OSError as error:
        raise FolderRefused([*problems, FileRefused(WEIGHTS_NAME, error.strerror or "cannot be read")]) from None
    if config is not None and not problems:
        stored, problems = find_updates(file.entries, config)
        if not problems:
            return PeftFolder(folder, config, statement, file, stored)
    file.close()
    raise FolderRefused(problems)


class FolderRefused(ValueError):
    """An adapter folder was refused; ``reasons`` says why, all of it."""

    def __init__(self, reasons: list[FileRefused]) -> None:
        super().__init__("; ".join(map(str, reasons)))
        self.reasons = reasons

    def problems(self, client: str) -> list[Problem]:
        """The reasons, as problems of `client`."""
        return [Problem(client, reason.field, reason.reason) for reason in self.reasons]


def read_statement(folder: Path) -> Statement | None:
    """The folder's `lora_merge.json`, or None where it has none; raises `FileRefused` where it is malformed."""
    if not (folder / FILE_NAME).exists():
        return None
    try:
        return Statement.from_json(parse_json(_read_small(folder / FILE_NAME, MAX_BYTES), FILE_NAME))
    except StatementError as error:
        raise FileRefused(f"{FILE_NAME}, {error.field}", error.reason) from error


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_small(path: Path, limit: int) -> bytes:
    if path.exists() and not path.is_file():
        raise FileRefused(path.name, "is not a regular file")
    try:
        with path.open("rb") as file:
            text = file.read(limit + 1)
    except OSError as error:
        raise FileRefused(path.name, error.strerror or "cannot be read") from error
    if len(text) > limit:
        raise FileRefused(path.name, f"is larger than {limit} bytes")
    return text
