"""Object ids as git computes them, so that a client's own hash of a file agrees with the tree's."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping


def object_id(kind: str, content: bytes) -> str:
    """The sha1 of a git object."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def blob_id(content: bytes) -> str:
    """The id of a file."""
    return object_id("blob", content)


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The text that git stores in the place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def tree_ids(blobs: Mapping[str, str]) -> dict[str, str]:
    """The id of every folder, the root being "", of a tree given as the blob id of each path."""
    children: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    children[""] = {}
    for path, oid in blobs.items():
        folder, _, name = path.rpartition("/")
        children[folder][name] = ("100644", oid)
        while folder:
            folder = folder.rpartition("/")[0]
            children.setdefault(folder, {})
    ids: dict[str, str] = {}
    for folder in sorted(children, key=lambda name: (name != "", name.count("/")), reverse=True):
        entries = sorted(children[folder].items(), key=lambda item: item[0] + ("/" if item[1][0] == "40000" else ""))
        ids[folder] = object_id("tree", b"".join(f"{m} {n}\0".encode() + bytes.fromhex(o) for n, (m, o) in entries))
        if folder:
            parent, _, name = folder.rpartition("/")
            children[parent][name] = ("40000", ids[folder])
    return ids


def commit_id(tree: str, parent: str | None, author: str, seconds: int, message: str) -> str:
    """The id of a commit."""
    who = f"{author} <{author}@users.noreply.local> {seconds} +0000"
    lines = [f"tree {tree}", *([f"parent {parent}"] if parent else []), f"author {who}", f"committer {who}"]
    return object_id("commit", ("\n".join(lines) + f"\n\n{message}\n").encode())
