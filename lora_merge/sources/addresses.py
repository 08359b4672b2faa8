"""Where adapters lie, however that is spelled: whole paths, over links and without, `hf://ORG/NAME`, URLs."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from lora_merge.errors import UsageError, one_line
from lora_merge.sources.filesystems import url_of
from lora_merge.sources.local import HERE, is_pattern, whole_path, whole_paths, without_scheme
from lora_merge.sources.reference import AdapterRef
from lora_merge.sources.rooms import ON_THE_HUB, is_on_the_hub


def addresses_of(ref: AdapterRef) -> frozenset[str]:
    """Where an adapter lies: `hf://ORG/NAME` and that `@COMMIT`; a folder's whole paths; a URL."""
    if ref.commit:
        return frozenset((f"hf://{ref.place}", f"hf://{ref.place}@{ref.commit}"))
    return frozenset((ref.place,)) if "://" in ref.place else whole_paths(ref.place)


class Entry:
    """A source in a list of them: what lies where it says is meant, and where it is a pattern, what that fits.

    `ORG/NAME` may be a folder here or a repository; nothing is looked up for it.

    Raises:
        UsageError: it is empty, or can be no path.
    """

    def __init__(self, text: str) -> None:
        if "\0" in text or not text.strip():
            raise UsageError(f"{one_line(text)!r} is no source.", hint="Is a variable of the shell not set?")
        self.text = text
        path = without_scheme(text)
        self._spelled = whole_path(path)
        self._addresses = _addresses(text)
        self._is_pattern = is_pattern(path)
        # A record holds no whole path, and of a URL nothing that lets one in.
        self.recorded = "its path" if path.startswith(("/", "~")) else text
        if _is_url(text):
            [self.recorded] = self._addresses

    def means(self, addresses: frozenset[str]) -> bool:
        """Whether it names the adapter at `addresses`."""
        if not self._addresses.isdisjoint(addresses):
            return True
        if not self._is_pattern:
            return False
        return any(_fits(ours.split("/"), other.split("/")) for ours in self._addresses for other in addresses)

    def named(self, refs: Mapping[AdapterRef, frozenset[str]]) -> list[AdapterRef]:
        """Those of `refs`, with their addresses, that it names: of several paths of one folder, the one that it has."""
        found = [ref for ref, addresses in refs.items() if self.means(addresses)]
        return [ref for ref in found if not ref.commit and whole_path(ref.place) == self._spelled] or found


def _addresses(text: str) -> frozenset[str]:
    """What may be meant, by its form; `lora_merge.sources.rooms` takes it for one of them."""
    if is_on_the_hub(text):
        from lora_merge.sources.hub import bare  # half a second that other lists need not wait

        return frozenset((f"hf://{bare(text).rstrip('/')}",))
    if _is_url(text):
        return frozenset((url_of(text),))
    repository = {f"hf://{text}"} if ON_THE_HUB.fullmatch(text) else set()
    return whole_paths(text) | repository


def _is_url(text: str) -> bool:
    """Whether fsspec is to read it."""
    return "://" in text and not text.startswith(HERE) and not is_on_the_hub(text)


def _fits(pattern: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether a path has the parts that a pattern has; `**` is any number of them."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(pattern[1:], parts[i:]) for i in range(len(parts) + 1))
    fits = bool(parts) and (pattern[0] == parts[0] or fnmatchcase(parts[0], pattern[0]))
    return fits and _fits(pattern[1:], parts[1:])
