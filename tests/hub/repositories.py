"""Repositories: commits, trees, branches, tags, pull requests. No accounts and no HTTP here."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tests.hub import git
from tests.hub.wire import Bytes, Readable, Refusal

Gated = Literal["auto", "manual", False]
LFS_SUFFIXES = (".bin", ".ckpt", ".gguf", ".gz", ".h5", ".npy", ".npz", ".onnx", ".parquet", ".pickle", ".pkl", ".pt",
                ".pth", ".safetensors", ".tar", ".tgz", ".zip")  # fmt: skip
LFS_SIZE = 10_000_000
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


def is_large(path: str, size: int) -> bool:
    """Whether a file is stored outside of git: by its suffix, as .gitattributes says, or by its size."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size >= LFS_SIZE)


@dataclass(frozen=True)
class File:
    """A file of a tree. A large one has a `sha256`, and `oid` is the id of its pointer."""

    oid: str
    size: int
    content: Readable
    sha256: str | None = None


def small_file(content: bytes) -> File:
    """A file that lies in git itself."""
    return File(git.blob_id(content), len(content), Bytes(content))


def large_file(sha256: str, content: Readable) -> File:
    """A file of which git has the pointer only."""
    return File(git.blob_id(git.lfs_pointer(sha256, content.size)), content.size, content, sha256)


@dataclass(frozen=True)
class Commit:
    """One commit. `folders` has the id of every folder; `date` is in seconds."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: int
    files: Mapping[str, File]
    folders: Mapping[str, str]


@dataclass
class Discussion:
    """A discussion, or a pull request where `base` names the commit that it started from."""

    num: int
    title: str
    description: str
    author: str
    date: int
    status: Literal["draft", "open", "closed", "merged"]
    target: str = "main"
    base: str | None = None
    merged_as: str | None = None


@dataclass
class Repository:
    """One model repository. `refs` are by full name: refs/heads/main, refs/tags/v1, refs/pr/1.

    `objects` are the large files that were uploaded for it, whether committed or not, by sha256.
    """

    id: str
    creator: str
    created: int
    private: bool = False
    gated: Gated = False
    granted: set[str] = field(default_factory=set)
    objects: set[str] = field(default_factory=set)
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0] if "/" in self.id else ""

    @property
    def head(self) -> Commit:
        return self.commits[self.refs["refs/heads/main"]]

    def ref(self, rev: str) -> str | None:
        """The full name of the branch, tag or pull request that `rev` names."""
        names = (rev, f"refs/heads/{rev}", f"refs/tags/{rev}")
        return next((name for name in names if name in self.refs), None)

    def at(self, rev: str) -> Commit:
        """The commit that a branch, a tag, refs/pr/N or a hash (7 digits or more) names."""
        if name := self.ref(rev):
            return self.commits[self.refs[name]]
        if re.fullmatch(r"[0-9a-f]{7,40}", rev):
            found = [commit for oid, commit in self.commits.items() if oid.startswith(rev)]
            if len(found) == 1:
                return found[0]
        raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")

    def file(self, rev: str, path: str) -> tuple[Commit, File]:
        """A file at a revision, and the commit that this is."""
        commit = self.at(rev)
        if path not in commit.files:
            refusal = Refusal(404, "Entry not found", "EntryNotFound")
            refusal.headers["X-Repo-Commit"] = commit.oid
            raise refusal
        return commit, commit.files[path]

    def commit(
        self, ref: str, files: Mapping[str, File], title: str, message: str, author: str, date: int,
        parent: str | None = None,
    ) -> Commit:  # fmt: skip
        """Makes `files` the tree of `ref`, on top of its present head, or of `parent` for a new ref."""
        parent = self.refs.get(ref, parent)
        folders = git.tree_ids({path: file.oid for path, file in files.items()})
        oid = git.commit_id(folders.pop(""), parent, author, date, f"{title}\n\n{message}")
        made = Commit(oid, parent, title, message, author, date, dict(sorted(files.items())), folders)
        self.commits[oid] = made
        self.refs[ref] = oid
        return made

    def history(self, commit: Commit) -> Iterator[Commit]:
        """A commit and its ancestors, the latest first."""
        yield commit
        while commit.parent is not None:
            commit = self.commits[commit.parent]
            yield commit

    def last_change(self, commit: Commit, path: str) -> Commit:
        """The commit that gave `path`, a file or a folder, what it holds at `commit`."""

        def held(at: Commit) -> str | None:
            return at.folders.get(path) or (at.files[path].oid if path in at.files else None)

        last = commit
        for older in self.history(commit):
            if held(older) != held(commit):
                break
            last = older
        return last

    def merge(self, pull: Discussion, author: str, date: int) -> Commit:
        """Applies what a pull request changed to its target; 409 where the target changed the same files."""
        target, base = self.at(pull.target), self.at(pull.base or pull.target)
        proposed = self.at(f"refs/pr/{pull.num}")
        changed = changes(base.files, proposed.files)
        if clash := sorted(set(changed) & set(changes(base.files, target.files))):
            raise Refusal(409, f"Conflicting files: {', '.join(clash)}")
        merged = apply(target.files, changed)
        made = self.commit(f"refs/heads/{pull.target}", merged, f"{pull.title} (#{pull.num})", "", author, date)
        pull.status, pull.merged_as = "merged", made.oid
        return made

    def squash(self, branch: str, title: str, author: str, date: int) -> Commit:
        """One commit in the place of a branch's history; commits that no ref reaches any more are gone."""
        files = self.at(branch).files
        del self.refs[f"refs/heads/{branch}"]
        made = self.commit(f"refs/heads/{branch}", files, title, "", author, date)
        reached = {commit.oid for oid in self.refs.values() for commit in self.history(self.commits[oid])}
        self.commits = {oid: commit for oid, commit in self.commits.items() if oid in reached}
        return made


def changes(old: Mapping[str, File], new: Mapping[str, File]) -> dict[str, File | None]:
    """What must be set, or deleted where nothing, to come from `old` to `new`."""
    paths = {path for path in (*old, *new) if old.get(path) != new.get(path)}
    return {path: new.get(path) for path in sorted(paths)}


def apply(files: Mapping[str, File], changed: Mapping[str, File | None]) -> dict[str, File]:
    """`files` after the changes."""
    merged = {**files, **changed}
    return {path: file for path, file in merged.items() if file is not None}


def children(commit: Commit, folder: str, recursive: bool) -> Sequence[str]:
    """Every path, file or folder, below `folder`, or directly in it."""
    prefix = f"{folder}/" if folder else ""
    paths = sorted(path for path in (*commit.files, *commit.folders) if path.startswith(prefix))
    return paths if recursive else [path for path in paths if "/" not in path[len(prefix) :]]
