"""A client's PEFT folder, opened strictly: config, header, statement; its tensors stay in the file until asked for."""

import hashlib
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lora_merge import ledger, ledger_form, lock
from lora_merge.adapter import FactorsSpec, Spec, Update
from lora_merge.checkpoint.config import MAX_CONFIG_BYTES, MAX_R, MAX_SCALING, AdapterConfig, read_config
from lora_merge.checkpoint.layout import Stored, owner_of
from lora_merge.checkpoint.safetensors_file import (
    FileRefused,
    SafetensorsFile,
    TensorEntry,
    open_safetensors,
    parse_json,
)
from lora_merge.checkpoint.updates import Updates, find_updates
from lora_merge.errors import NotFoundError, Problem, one_line
from lora_merge.statement import FILE_NAME, MAX_BYTES, Statement, StatementError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LEDGER_NAME = ledger.FILE_NAME
LOCK_NAME = lock.FILE_NAME
CORE_NAME = "aggregation_core.safetensors"  # what stands for the clients so far where a truncated mean is folded
PICKLE_NAME = "adapter_model.bin"
RECORD_NAMES = (LEDGER_NAME, LOCK_NAME, CORE_NAME)  # of a merge
READ_NAMES = (CONFIG_NAME, WEIGHTS_NAME, FILE_NAME, *RECORD_NAMES)


@dataclass(frozen=True)
class Description:
    """What an adapter's config, statement and header say; its tensors need not be at hand."""

    config: AdapterConfig
    statement: Statement | None
    stored: Updates

    @property
    def specs(self) -> Mapping[str, Spec]:
        return self.stored.specs

    @property
    def is_plain(self) -> bool:
        """Whether it is nothing but low-rank updates B @ A: no bias, no magnitude, no tensor trained whole."""
        return all(isinstance(s, FactorsSpec) and not s.bias and not s.magnitude for s in self.specs.values())


@dataclass(frozen=True)
class PeftFolder(Description):
    """An accepted adapter folder; an `Adapter` whose updates are read from the file when asked for.

    `small` is the sha256 of each small file, of the very bytes that were parsed.
    """

    folder: Path
    file: SafetensorsFile
    small: Mapping[str, str]

    def __getitem__(self, module: str) -> Update:
        return self.stored[module].load(self.file)

    def sha256(self) -> dict[str, str]:
        """The sha256 of each file that the merge reads, by name: of what was opened, whatever its path holds now."""
        return {**self.small, WEIGHTS_NAME: self.file.sha256()}

    def close(self) -> None:
        self.file.close()


def open_folder(folder: Path) -> PeftFolder:
    """Open an adapter folder.

    Raises:
        FolderRefused: with every reason to refuse it.
        NotFoundError: the folder, or a file in it, may not be read.
    """
    if not os.access(folder, os.R_OK | os.X_OK) and folder.is_dir():
        raise NotFoundError(f"{folder} may not be read: permission denied.")
    names = [name for name in (*READ_NAMES, PICKLE_NAME) if os.path.lexists(folder / name)]
    if not names and (folder / "config.json").is_file():
        reason = "is that of a whole model, not of a LoRA adapter: a model is given as --base"
        raise FolderRefused([FileRefused("config.json", reason)])
    if odd := [name for name in names if name in RECORD_NAMES and not (folder / name).is_file()]:
        # Nothing below may need them, and whoever did not see them would take a merged adapter for a client's.
        raise FolderRefused([FileRefused(name, "is not a regular file, nor a link to one") for name in odd])
    opened: list[SafetensorsFile] = []
    small: dict[str, str] = {}

    def read(name: str, limit: int) -> bytes:
        text = _read_small(folder / name, limit)
        small[name] = hashlib.sha256(text).hexdigest()
        return text

    def entries() -> Mapping[str, TensorEntry]:
        others = {path.name for path in folder.glob("*.safetensors")}.difference(READ_NAMES)
        if WEIGHTS_NAME not in names and others:
            raise FileRefused("file", f"is not there; {one_line(min(others))} is no name that PEFT reads an adapter by")
        opened.append(open_safetensors(folder / WEIGHTS_NAME))
        return opened[0].entries

    try:
        found = describe(names, read, entries)
    except BaseException:
        for file in opened:
            file.close()
        raise
    return PeftFolder(found.config, found.statement, found.stored, folder, opened[0], small)


def describe(
    names: Collection[str], read: Callable[[str, int], bytes], entries: Callable[[], Mapping[str, TensorEntry]]
) -> Description:
    """An adapter from its small files and its header, wherever they lie.

    Args:
        names: the files that are there.
        read: a small file's bytes by name, of which so many are accepted; raises `FileRefused`.
        entries: the weights' header; raises `FileRefused` or `OSError`.

    Raises:
        FolderRefused: with every reason to refuse it.
        NotFoundError: a file may not be read.
    """
    if PICKLE_NAME in names and WEIGHTS_NAME not in names:
        reason = (
            f"is a pickle, which can run code when read; only {WEIGHTS_NAME} is accepted, which PEFT's save_pretrained "
            "writes since its version 0.5"
        )
        raise FolderRefused([FileRefused(PICKLE_NAME, reason)])
    problems: list[FileRefused] = []
    merged = LEDGER_NAME in names
    statement = config = None
    try:
        data = parse_json(read(CONFIG_NAME, MAX_CONFIG_BYTES), CONFIG_NAME, endless=problems)
        config, refused = read_config(data, merged=merged)
        problems += refused
        if merged and config != read_config(data)[0]:
            ledger_of(read(LEDGER_NAME, ledger.MAX_BYTES))  # without one it is a client's, whatever it says
    except FileRefused as problem:
        problems.append(problem)
    try:
        statement = _statement(read(FILE_NAME, MAX_BYTES)) if FILE_NAME in names else None
    except FileRefused as problem:
        problems.append(problem)
    try:
        header = entries()
    except FileRefused as problem:
        raise FolderRefused([*problems, FileRefused(f"{WEIGHTS_NAME}, {problem.field}", problem.reason)]) from None
    except PermissionError as error:
        raise _no_access(error) from error
    except OSError as error:
        raise FolderRefused([*problems, FileRefused(WEIGHTS_NAME, error.strerror or "cannot be read")]) from None
    if config is not None:
        stored, refused = find_updates(header, config)
        problems += refused or [*_too_wide(stored, config), *([] if merged else _too_large(stored))]
        if not problems:
            return Description(config, statement, stored)
    raise FolderRefused(problems)


class FolderRefused(ValueError):
    """An adapter folder was refused; ``reasons`` says why, all of it."""

    def __init__(self, reasons: list[FileRefused]) -> None:
        super().__init__("; ".join(map(str, reasons)))
        self.reasons = reasons

    def problems(self, client: str) -> list[Problem]:
        """The reasons, as problems of `client`."""
        return [Problem(client, reason.field, reason.reason) for reason in self.reasons]


def read_ledger(folder: Path) -> ledger.Ledger:
    """The ledger in `folder`, strictly read, and no more of it than a ledger may have.

    Raises:
        FileRefused: it is too large or malformed.
    """
    with (folder / LEDGER_NAME).open("rb") as file:
        text = file.read(ledger.MAX_BYTES + 1)
    if len(text) > ledger.MAX_BYTES:
        raise FileRefused(f"{LEDGER_NAME}, file", f"is larger than {ledger.MAX_BYTES} bytes")
    return ledger_of(text)


@lru_cache(maxsize=1)  # it is asked for more than once while an arrival is brought in, and may name thousands
def ledger_of(text: bytes) -> ledger.Ledger:
    """The ledger whose file holds `text`, strictly read.

    Raises:
        FileRefused: it is malformed.
    """
    try:
        return ledger.Ledger.from_json(parse_json(text, "file"))
    except (ledger_form.LedgerError, FileRefused) as error:
        raise FileRefused(f"{LEDGER_NAME}, {error.field}", error.reason) from error


def _too_wide(stored: Mapping[str, Stored], config: AdapterConfig) -> Iterator[FileRefused]:
    """The ranks above a client's limit that no module is large enough for.

    The parts of a wrapped module have one rank, which goes by the largest; a grouped convolution's counts every group.
    """
    specs = {name: each.spec for name, each in stored.items() if isinstance(each.spec, FactorsSpec)}
    ranks = {name: spec.r * (spec.blocks if spec.layout == "conv" else 1) for name, spec in specs.items()}
    limits: dict[str, int] = {}
    for name, spec in specs.items():
        limits[owner_of(name)] = max(min(spec.d_in, spec.d_out), limits.get(owner_of(name), 0))
    for name, spec in specs.items():
        if ranks[name] > MAX_R and spec.r > limits[owner_of(name)]:
            yield FileRefused(
                name, f"has rank {spec.r}, above its size: no update has more than {limits[owner_of(name)]}"
            )
    if config.largest_rank > max(MAX_R, *ranks.values(), 0):
        yield FileRefused("r or rank_pattern", f"names the rank {config.largest_rank}, which no module has")


def _too_large(stored: Mapping[str, Stored]) -> Iterator[FileRefused]:
    """The modules whose scaling is above a client's limit."""
    for name, each in stored.items():
        if isinstance(each.spec, FactorsSpec) and not 0 < each.spec.scaling <= MAX_SCALING:
            reason = f"gives {name} the scaling {each.spec.scaling:g}; at most {MAX_SCALING:g} is accepted"
            yield FileRefused("lora_alpha", reason)


def _no_access(error: PermissionError) -> NotFoundError:
    return NotFoundError(f"{error.filename} may not be read: permission denied.")


def _statement(text: bytes) -> Statement:
    try:
        return Statement.from_json(parse_json(text, FILE_NAME))
    except StatementError as error:
        raise FileRefused(f"{FILE_NAME}, {error.field}", error.reason) from error


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK)  # a pipe that nobody writes to must not hang


def _read_small(path: Path, limit: int) -> bytes:
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # of what was opened, whatever lies there by now
                raise FileRefused(path.name, "is not a regular file")
            text = file.read(limit + 1)
    except IsADirectoryError as error:
        raise FileRefused(path.name, "is not a regular file") from error
    except PermissionError as error:
        raise _no_access(error) from error
    except OSError as error:
        raise FileRefused(path.name, error.strerror or "cannot be read") from error
    if len(text) > limit:
        raise FileRefused(path.name, f"is larger than {limit} bytes")
    return text
