"""Adapters in repositories of the Hub: patterns, revisions and collections, pinned to commits.

Two API calls a client at most: `model_info` pins, lists and hashes in one answer; the other is Xet's token. A listing
of an author, which counts once per thousand repositories, is already pinned.
"""

import difflib
import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from lora_merge import ledger, lock
from lora_merge.checkpoint.config import MAX_CONFIG_BYTES
from lora_merge.checkpoint.peft_folder import (
    CONFIG_NAME,
    CORE_NAME,
    LEDGER_NAME,
    LOCK_NAME,
    PICKLE_NAME,
    READ_NAMES,
    WEIGHTS_NAME,
    Description,
    FolderRefused,
    describe,
)
from lora_merge.checkpoint.safetensors_file import FileRefused, TensorEntry, header_bytes, read_header
from lora_merge.errors import NetworkError, NotFoundError, UsageError, one_line
from lora_merge.hub.failures import asking
from lora_merge.hub.ranges import read_range
from lora_merge.hub.session import endpoint, is_offline
from lora_merge.sources.hub_cache import cached_entries, cached_file, fetch_file, hash_problem, remove_leftovers
from lora_merge.sources.patterns import clients_of
from lora_merge.sources.reference import AdapterRef, Advance, Candidate, FileEntry
from lora_merge.statement import FILE_NAME, MAX_BYTES

HEADER_GUESS = 1 << 17  # bytes: the header of most adapters fits
LIMITS = {CONFIG_NAME: MAX_CONFIG_BYTES, FILE_NAME: MAX_BYTES, LEDGER_NAME: ledger.MAX_BYTES, LOCK_NAME: lock.MAX_BYTES}

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"(?P<repo>(?P<owner>[\w.-]+)/(?P<name>[\w.\-*?\[\]!]+))(@(?P<revision>[^\s@]+))?")
_COLLECTION = re.compile(r"[\w.-]+/[\w.-]+-[0-9a-f]{24}")
_WILD = re.compile(r"\[[^]]*\]|[*?]")


class HubRoom:
    """The Hub as a place that adapters come from.

    Attributes:
        api: of an open `hub_session`.
        pins: commits by repository: all that is known of the Hub under HF_HUB_OFFLINE.
        notes: what a pattern matched and did not take.
    """

    store = Path(constants.HF_HUB_CACHE)

    def __init__(self, api: HfApi, pins: Mapping[str, str] | None = None) -> None:
        self.api, self.pins = api, pins or {}
        self.notes: list[str] = []
        self._infos: dict[tuple[str, str], ModelInfo] = {}

    def expand(self, source: str) -> list[AdapterRef]:
        """The repositories that `source` names, each at a commit.

        Raises:
            NotFoundError: there is none; with near misses.
            UsageError: it has the form of no source.
        """
        name = bare(source)
        if collection := re.fullmatch(r"collections/(.+)", name):
            return self._collection(collection[1], source)
        if _COLLECTION.fullmatch(name) and not source.startswith("hf://"):
            return self._collection(name, source)
        found = _REPOSITORY.fullmatch(name)
        if not found:
            raise UsageError(
                f"{one_line(source)} is no source.", hint="ORG/NAME, ORG/PATTERN-*, either with @REVISION."
            )
        repo, revision = found["repo"], found["revision"]
        if not _WILD.search(repo):
            return [self._pinned(repo, revision, source)]
        shas = self._matching(found["owner"], repo)
        if revision:
            return [self._pinned(each, revision, source) for each in shas]
        return [AdapterRef(each, source, each, sha, room=self) for each, sha in shas.items()]

    def version(self, ref: AdapterRef) -> str:
        return _commit(ref)

    def examine(self, ref: AdapterRef) -> Candidate:
        """List a repository and read its config, statement and header; nothing is written.

        Raises:
            FolderRefused: with every reason.
            NotFoundError: it may not be read.
        """
        files = self._files(ref)
        too_large = [
            FileRefused(name, f"has {file.size} bytes; at most {limit} are accepted")
            for name, file in files.items()
            if name not in (WEIGHTS_NAME, CORE_NAME, PICKLE_NAME)
            if file.size > (limit := LIMITS[name])
        ]
        if too_large:
            raise FolderRefused(too_large)
        try:
            description = self._described(ref, files, trust_cache=True)
        except FolderRefused:
            # No hash covers a part of a file, nor was the cache looked at yet: ask the Hub before refusing.
            description = self._described(ref, files, trust_cache=False)
        return Candidate(ref, {name: file for name, file in files.items() if name != PICKLE_NAME}, description)

    def _described(self, ref: AdapterRef, files: Mapping[str, FileEntry], *, trust_cache: bool) -> Description:
        return describe(
            list(files),
            lambda name, limit: self._small(ref, files, name),
            lambda: self._header(ref, files, trust_cache=trust_cache),
        )

    def fetch(self, candidate: Candidate, advance: Advance) -> Path:
        """Download what is not in the cache, and check every file against its listed hash, cached ones too.

        Raises:
            FolderRefused: a file has not the hash that the Hub lists, twice.
            StorageError: the disk is full or not writable.
        """
        ref = candidate.ref
        remove_leftovers(ref.place)
        paths = [fetch_file(ref.place, _commit(ref), file, advance) for file in candidate.files.values()]
        folder = paths[0].parent
        if planted := [name for name in READ_NAMES if name not in candidate.files and (folder / name).exists()]:
            reason = f"lies in the cache ({folder}) and not in the repository"
            raise FolderRefused([FileRefused(name, reason) for name in planted])
        return folder

    def missing_bytes(self, candidate: Candidate) -> int:
        ref = candidate.ref
        files = candidate.files.values()
        return sum(file.size for file in files if cached_file(ref.place, _commit(ref), file.name) is None)

    def _collection(self, slug: str, given: str) -> list[AdapterRef]:
        with asking(slug):
            items = [item.item_id for item in self.api.get_collection(slug).items if item.item_type == "model"]
        if not items:
            raise NotFoundError(f"The collection {slug} holds no model.", hint=f"See {endpoint()}/collections/{slug}")
        refs = {repo: self._pinned(repo, None, given) for repo in sorted(items)}
        infos = {repo: None if is_offline() else self._infos[repo, _commit(ref)] for repo, ref in refs.items()}
        return [refs[repo] for repo in self._clients(given, {repo: _names(info) for repo, info in infos.items()})]

    def _matching(self, owner: str, pattern: str) -> dict[str, str]:
        """The owner's repositories that fit, with their heads."""
        if _WILD.search(owner):
            raise UsageError(f"{pattern}: the part before the slash must be one user or organisation.")
        heads, held = self._listed(owner, pattern)
        fitting = [repo for repo in sorted(heads) if fnmatch.fnmatchcase(repo, pattern)]
        if not fitting and is_offline():
            raise _needs_the_hub(pattern)
        if not fitting:
            raise NotFoundError(f"No repository matches {pattern}.", hint=self._near(owner, pattern, heads))
        found = {repo: heads[repo] for repo in self._clients(pattern, {repo: held[repo] for repo in fitting})}
        if odd := [repo for repo, sha in found.items() if not _COMMIT.fullmatch(sha)]:
            raise NotFoundError(f"{', '.join(odd)}: there is no commit to read.")
        return found

    def _listed(self, owner: str, pattern: str) -> tuple[dict[str, str], dict[str, set[str]]]:
        """The owner's repositories with their heads, and the names of the files in each."""
        if is_offline():
            return dict(self.pins), {repo: set() for repo in self.pins}
        literal = max(_WILD.split(pattern.partition("/")[2]), key=len)
        with asking(owner):  # the Hub's own search ignores case
            listed = list(self.api.list_models(author=owner, search=literal or None, expand=["sha", "siblings"]))
            return {model.id: str(model.sha) for model in listed}, {model.id: _names(model) for model in listed}

    def _clients(self, source: str, held: Mapping[str, Collection[str]]) -> Sequence[str]:
        clients, note = clients_of(source, held)
        self.notes += [note] if note else []
        return clients

    def _near(self, owner: str, pattern: str, heads: Mapping[str, str]) -> str:
        with asking(owner):
            repos = list(heads) or [model.id for model in self.api.list_models(author=owner, limit=1000)]
        near = difflib.get_close_matches(_WILD.sub("", pattern), repos, n=3, cutoff=0.5)
        if near:
            return f"Did you mean {', '.join(near)}?"
        return f"{owner} has no repository that you may see; to see private ones: hf auth login" if not repos else ""

    def _pinned(self, repo: str, revision: str | None, given: str) -> AdapterRef:
        if is_offline():
            commit = revision or self.pins.get(repo, "")
            if not _COMMIT.fullmatch(commit):
                raise _needs_the_hub(given)
            return AdapterRef(repo, given, repo, commit, room=self)
        with asking(repo):
            info = self.api.model_info(repo, revision=revision, files_metadata=True)
            commit = str(info.sha)
        if not _COMMIT.fullmatch(commit) or (_COMMIT.fullmatch(revision or "") and commit != revision):
            raise NetworkError(f"{repo}: the Hub answers with the commit {commit[:60]!r}.")
        self._infos[repo, commit] = info
        return AdapterRef(repo, given, repo, commit, room=self)

    def _files(self, ref: AdapterRef) -> dict[str, FileEntry]:
        """The files that a merge may read, as the repository lists them."""
        key = (ref.place, _commit(ref))
        if is_offline():
            return cached_entries(*key)
        if key not in self._infos:
            self._pinned(*key, ref.given)
        with asking(ref.place):
            listed = [_entry(sibling) for sibling in self._infos.pop(key).siblings or []]
        return {file.name: file for file in listed if file.name in (*READ_NAMES, PICKLE_NAME)}

    def _small(self, ref: AdapterRef, files: Mapping[str, FileEntry], name: str) -> bytes:
        """A small file, whole and with its listed hash."""
        if name not in files:
            raise FileRefused(name, "is not in the repository")
        file = files[name]
        if (path := cached_file(ref.place, _commit(ref), name)) and hash_problem(
            text := path.read_bytes(), file
        ) is None:
            return text
        for _ in range(2):
            text = read_range(ref.place, name, _commit(ref), 0, max(file.size, 1))
            if (problem := hash_problem(text, file)) is None:
                return text
        raise FileRefused(name, f"{problem}, twice")

    def _header(
        self, ref: AdapterRef, files: Mapping[str, FileEntry], *, trust_cache: bool
    ) -> Mapping[str, TensorEntry]:
        if WEIGHTS_NAME not in files:
            raise FileRefused("file", "is not in the repository")
        size = files[WEIGHTS_NAME].size
        cached = cached_file(ref.place, _commit(ref), WEIGHTS_NAME) if trust_cache else None

        def read(start: int, stop: int) -> bytes:
            if cached is None:
                return read_range(ref.place, WEIGHTS_NAME, _commit(ref), start, stop)
            with cached.open("rb") as file:
                file.seek(start)
                return file.read(stop - start)

        text = read(0, min(HEADER_GUESS, max(size, 1)))
        needed = header_bytes(text)
        if needed > len(text) and needed <= size:
            text += read(len(text), needed)
        return read_header(text, size)


def is_web_address(source: str) -> bool:
    """Whether `source` is an address of the Hub in a browser."""
    return source.startswith((f"{endpoint()}/", "https://huggingface.co/", "https://hf.co/"))


def bare(source: str) -> str:
    """`org/name@revision` or `collections/…`, from those with `hf://` before and from a browser's address."""
    if is_web_address(source):
        path = source.partition("://")[2].partition("/")[2].split("?")[0].rstrip("/")
        return re.sub(r"/tree/(.+)$", r"@\1", path)
    return source.removeprefix("hf://").removeprefix("models/") if source.startswith("hf://") else source


def _needs_the_hub(source: str) -> NetworkError:
    hint = (
        "Offline, name commits whose files are in the cache: ORG/NAME@COMMIT, or --lock FILE. Or: unset HF_HUB_OFFLINE"
    )
    return NetworkError(f"{one_line(source)} has to be looked up on the Hub, and HF_HUB_OFFLINE is set.", hint=hint)


def _names(info: ModelInfo | None) -> set[str]:
    """The names of a repository's files, as far as they are listed."""
    return {file.rfilename for file in (info.siblings if info else None) or []}


def _entry(sibling: RepoSibling) -> FileEntry:
    size = sibling.lfs.size if sibling.lfs else sibling.size
    if not isinstance(size, int) or size < 0:
        raise ValueError(f"{sibling.rfilename} is listed without a size")
    if sibling.lfs:
        return FileEntry(sibling.rfilename, size, sha256=sibling.lfs.sha256)
    return FileEntry(sibling.rfilename, size, git_sha1=sibling.blob_id)


def _commit(ref: AdapterRef) -> str:
    assert ref.commit is not None
    return ref.commit
