"""Base models: a folder, or a repository at one commit, every file with its listed hash; what identifies weights."""

import fnmatch
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lora_merge.errors import NetworkError, NotFoundError, UsageError, one_line
from lora_merge.hub.session import hub_session, interrupt, is_offline
from lora_merge.hub.waiting import MAX_WAIT
from lora_merge.sources.hub_cache import cached_entry, fetch_file, hash_problem, remove_leftovers
from lora_merge.sources.listing import COMMIT, Listing, fetched, listing
from lora_merge.sources.local import nor_a_folder
from lora_merge.sources.parallel import for_each
from lora_merge.sources.reference import Advance, FileEntry, Tell
from lora_merge.statement import BaseModel

INDEX_NAME = "model.safetensors.index.json"
SECONDS_BETWEEN_LINES = 20.0
_OFFLINE = "HF_HUB_OFFLINE is set"
# Beside the weights, what a model and its tokenizer are made of; weights in pickles are never fetched.
_BESIDE = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class FoundBase:
    """A base model at hand: its folder, and the commit where it came from the Hub (else None)."""

    repo: str
    folder: Path
    commit: str | None

    def statement(self) -> BaseModel:
        """What the client states of its base: repository, commit, and the sha256 of the weights."""
        return BaseModel(self.repo, self.commit, weights_sha256(self.folder))


def find_model(base: str, tell: Tell, *, max_wait: float = MAX_WAIT, listed: Listing | None = None) -> FoundBase:
    """The base model in the folder `base`, else of that repository id; as `model_in` and `model_of`."""
    if _names_folder(base):
        return model_in(Path(base), base)
    try:
        return model_of(base, None, tell, max_wait=max_wait, listed=listed)
    except (NetworkError, NotFoundError) as error:
        raise nor_a_folder([base], error) from error


def require_model(base: str, tell: Tell, *, max_wait: float = MAX_WAIT) -> Listing | None:
    """Raise what `find_model` would, where it shows before anything is downloaded, or read from the cache.

    Returns:
        What the Hub lists, where it was asked: `find_model` need not ask again.
    """
    if _names_folder(base):
        model_in(Path(base), base)
        return None
    try:
        if is_offline():
            _in_cache(base, None, _OFFLINE)
            return None
        with _of_a_base(), hub_session(max_wait, tell) as api:
            return listing(api, base, None)
    except (NetworkError, NotFoundError) as error:
        raise nor_a_folder([base], error) from error


def _names_folder(base: str) -> bool:
    return os.path.isdir(base) or base.startswith((".", "/", "~")) or base.count("/") > 1


def model_in(folder: Path, repo: str) -> FoundBase:
    """The model `repo` in a folder on this machine.

    Raises:
        NotFoundError: there is no such folder.
        UsageError: it is not a model with safetensors weights.
    """
    if not folder.is_dir():
        raise NotFoundError(f"--base {folder}: there is no such folder.")
    return _sound(FoundBase(repo, folder, None))


def model_of(
    repo: str, revision: str | None, tell: Tell, *, max_wait: float = MAX_WAIT, listed: Listing | None = None
) -> FoundBase:
    """The model of a repository at the commit that `revision` (None is the main branch) is at, in the cache.

    A commit that is wholly in the cache will do where the Hub cannot be reached; under HF_HUB_OFFLINE, so will the
    branch as the cache last saw it.

    Args:
        listed: what the Hub has said is there, where it was asked already.

    Raises:
        NotFoundError: there is no such repository or revision, or it may not be read.
        NetworkError: it is not in the cache, and the Hub cannot be reached.
        RefusedError: a file has twice not the hash that is listed.
        UsageError: it is not a model with safetensors weights.
    """
    if is_offline():
        return _cached(repo, revision, tell, _OFFLINE)
    with _of_a_base():
        try:
            return _sound(_downloaded(repo, revision, tell, max_wait, listed))
        except NetworkError as error:
            if not COMMIT.fullmatch(revision or ""):
                raise
            why = error.message.rstrip(".")
    return _cached(repo, revision, tell, why)


@contextmanager
def _of_a_base() -> Iterator[None]:
    """Say of what the Hub has not, or cannot be asked for, that a base model may come from a folder too."""
    try:
        yield
    except NetworkError as error:
        raise NetworkError(error.message, hint="Give the base model from a folder: --base DIR") from error
    except NotFoundError as error:
        hint = f"{error.hint} Or give the base model from a folder: --base DIR".strip()
        raise NotFoundError(f"Base model: {error.message}", hint=hint) from error


def _downloaded(repo: str, revision: str | None, tell: Tell, max_wait: float, listed: Listing | None) -> FoundBase:
    with hub_session(max_wait, tell) as api:
        commit, files = listed or listing(api, repo, revision)
        remove_leftovers(repo)
        wanted = _wanted(repo, commit, files)
        size = sum(file.size for file in wanted)
        tell(f"Base model {repo} at {commit}, {size / 1e6:.1f} MB")
        advance = _said_now_and_then(tell, repo)
        paths = for_each(
            lambda file: fetch_file(repo, commit, file, advance), wanted, lambda file: f"{repo}, {file.name}", interrupt
        )
        return FoundBase(repo, paths[0].parent, commit)


def _wanted(repo: str, commit: str, files: Mapping[str, FileEntry]) -> Sequence[FileEntry]:
    """The weights that the index names, or the only ones; and what else the model and its tokenizer are made of."""
    if "config.json" not in files:
        raise UsageError(f"{repo} holds no config.json: it is not a model.")
    names = indexed(fetched(repo, commit, files[INDEX_NAME])) if INDEX_NAME in files else {"model.safetensors"}
    if missing := sorted(names - files.keys()):
        raise UsageError(f"{repo}: the weights lack {', '.join(missing)[:200]}; only safetensors are read.")
    beside = {name for name in files if "/" not in name and any(fnmatch.fnmatchcase(name, each) for each in _BESIDE)}
    return [files[name] for name in sorted(names | beside)]


def _cached(repo: str, revision: str | None, tell: Tell, why: str) -> FoundBase:
    """What the cache has of a revision, each file against the hash that it is called by there."""
    found = _in_cache(repo, revision, why)
    tell(f"Base model {repo} at {found.commit}, from the local cache: {why}")
    for path in sorted(each for each in found.folder.iterdir() if each.is_file()):
        if (entry := cached_entry(path.name, path)) and (problem := hash_problem(path, entry)):
            raise NetworkError(f"{path} {problem}, and {why}.", hint="Download it again.")
    return found


def _in_cache(repo: str, revision: str | None, why: str) -> FoundBase:
    """What the cache has of a revision, unread."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    where = one_line(repo) + (f" at {revision}" if revision else "")
    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        return _sound(FoundBase(repo, folder, folder.name))
    except (UsageError, LocalEntryNotFoundError, HFValidationError) as error:
        hint = "Give the base model from a folder: --base DIR"
        raise NetworkError(f"{where} is not in the local cache, and {why}.", hint=hint) from error


def _said_now_and_then(tell: Tell, repo: str) -> Advance:
    """Counts bytes, and says how many there are every twenty seconds."""
    lock, state = threading.Lock(), {"bytes": 0.0, "said": time.monotonic()}

    def advance(count: int) -> None:
        with lock:
            state["bytes"] += count
            if time.monotonic() - state["said"] < SECONDS_BETWEEN_LINES:
                return
            state["said"] = time.monotonic()
        tell(f"Base model {repo}: {state['bytes'] / 1e6:.1f} MB downloaded")

    return advance


def _sound(found: FoundBase) -> FoundBase:
    """`found`, if it is a model folder that may be read: what transformers says otherwise helps nobody."""
    try:
        locked = [path for path in found.folder.iterdir() if path.is_file() and not os.access(path, os.R_OK)]
    except PermissionError:
        locked = [found.folder]
    if locked:
        raise NotFoundError(f"Base model: {min(locked)} may not be read: permission denied.")
    if not (found.folder / "config.json").is_file():
        raise UsageError(f"{found.folder} holds no config.json: it is not a model.")
    weight_files(found.folder)
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a model folder's weights, sorted: those of its index, or the only one.

    Raises:
        UsageError: there are none, or some are missing.
    """
    names = {"model.safetensors"}
    if (folder / INDEX_NAME).is_file():
        names = indexed(folder / INDEX_NAME)
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise UsageError(f"{folder}: the weights lack {', '.join(missing)[:200]}; only safetensors are read.")
    return [folder / name for name in sorted(names)]


def indexed(index: Path) -> set[str]:
    """The weight files that an index names; raises `UsageError` where it is none."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{index} is not an index of weights.") from error
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise UsageError(f"{index}: the index names files outside its folder, or none.")
    return names


def weights_sha256(folder: Path) -> str:
    """One sha256 for a model folder's weights: of the lines `NAME SHA256`, one a file, sorted by name.

    The files are those of `weight_files`, so a folder and the Hub's repository agree whatever else they hold.
    """
    hashes = {}
    for path in weight_files(folder):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return weights_digest(hashes)


def weights_digest(hashes: Mapping[str, str]) -> str:
    """What `weights_sha256` says of files with these sha256, by name."""
    lines = [f"{name} {sha256}\n" for name, sha256 in sorted(hashes.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
