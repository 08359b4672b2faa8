"""What must never be published: credentials, and paths on somebody's machine. Found by form; never repeated.

In prose only a home's path is known for one; in JSON every text that is an absolute path as a whole, and within a text
one that begins with a drive or with a folder where people keep their work.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Not inside a longer word: `task-…` holds no `sk-…`, and a sha256 holds no key.
_START, _END = r"(?<![A-Za-z0-9_])", r"(?![A-Za-z0-9])"

_SCHEME = r"(?<![A-Za-z0-9+.\-])[A-Za-z][A-Za-z0-9+.\-]*"

# Where a path may begin: not inside a longer one (`org/home/x`), nor with the host of an address (`https://home/x`),
# but after a colon (`host:/home/x`), three slashes of an address that has no host, and `-I`, `-L` of a compiler.
_PATH = r"(?:(?<![\w./])(?!(?<=:)//[^/])(?:file:/*)?|(?<![\w./\-])-[A-Za-z])"
# A path of three parts whose first folders end in home or Users.
_POSIX_HOME = rf"{_PATH}(?:/[\w.\-]+)*?/+(?:home|Users)/+[^\s/\"'`<>|]+"
_USERS = r"(?:users|documents and settings)"
_WINDOWS_HOME = (
    rf"(?i)(?<![a-z])[a-z]:[\\/]+{_USERS}[\\/]+[^\s\\/\"']"
    rf"|(?<![\w\\])\\\\+(?:[\w.$\-]+\\+)+?{_USERS}\\+[^\s\\/\"']"  # of another machine
)

_FORMS: Mapping[str, str] = {
    "a Hugging Face token": rf"{_START}(?:hf_|api_org_)[A-Za-z0-9]{{20,}}",
    "an AWS access key": rf"{_START}(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{{16}}{_END}",
    "an AWS secret key": r"(?i)aws.{0,20}?(?:secret|private).{0,20}?[=:\s\"']+[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])",
    "a Google API key": rf"{_START}AIza[A-Za-z0-9_\-]{{35}}",
    "a Google OAuth secret": rf"{_START}(?:GOCSPX-[A-Za-z0-9_\-]{{20,}}|ya29\.[A-Za-z0-9_\-]{{20,}})",
    "an Azure storage key": r"AccountKey=[A-Za-z0-9+/]{40,}={0,2}",
    "a GitHub token": rf"{_START}(?:gh[pousr]_[A-Za-z0-9]{{20,}}|github_pat_[A-Za-z0-9_]{{20,}})",
    "a GitLab token": rf"{_START}gl(?:pat|dt|rt|cbt|ptt|oas)-[A-Za-z0-9_\-]{{20,}}",
    "an API key of the form sk-…": rf"{_START}sk-(?=[A-Za-z_\-]{{0,100}}[0-9])[A-Za-z0-9_\-]{{20,}}",
    "a Stripe key": rf"{_START}[sr]k_(?:live|test)_[A-Za-z0-9]{{16,}}",
    "a Slack token": rf"{_START}(?:xox[abeoprs]|xapp-[0-9])-[A-Za-z0-9\-]{{10,}}",
    "an npm token": rf"{_START}npm_[A-Za-z0-9]{{36}}",
    "a PyPI token": rf"{_START}pypi-[A-Za-z0-9_\-]{{40,}}",
    "a private key": r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----|PuTTY-User-Key-File-\d",
    "a JSON web token": rf"{_START}eyJ[A-Za-z0-9_\-]{{8,}}\.eyJ[A-Za-z0-9_\-]{{8,}}\.[A-Za-z0-9_\-]*",
    "an authorization header": r"(?i)authorization[\"']?\s*[:=]\s*[\"']?(?:bearer|basic|token)\s+[\w+/=.\-]{8,}",
    "a password in an address": rf"{_SCHEME}://[^\s/:@\"'<>]*:[^\s/@\"'<>]+@",
    # Longer than a name, and with a digit: `ssh://git@host` is none.
    "a token in an address": rf"{_SCHEME}://(?=[A-Za-z_\-]{{0,100}}[0-9])[A-Za-z0-9_\-]{{20,}}:?@",
    "a path of a home folder": rf"{_POSIX_HOME}|{_PATH}/+root/",
    "a path of a Windows home folder": _WINDOWS_HOME,
}
_ABSOLUTE = re.compile(r"(?:file:)?/+[^/\s]|~\w*/|[A-Za-z]:[\\/]|\\\\\w", re.ASCII)
# Where whoever has no room at home keeps data and models. `/usr/bin` is on every machine, `/v1/chat` on none.
_PLACES = (
    "cluster|content|data|datasets|dbfs|export|fsx|gpfs|kaggle|lustre|media|mnt|models|net|nfs|nvme|opt|private"
    "|projects?|raid|scratch|shared?|srv|ssd|storage|tmp|var|Volumes|work|workspace"
)
_WITHIN = re.compile(
    rf"(?<![A-Za-z])(?:file:/+[^/\s]|[A-Za-z]:(?:\\+[\w.\- ]+\\|/[\w.\-]+/))|{_PATH}/+(?:{_PLACES})\d*/+[\w.\-]",
)
_ADDRESS = re.compile(rf"(?!file:){_SCHEME}://[^\s/]\S*")
_PATTERNS = {kind: re.compile(form) for kind, form in _FORMS.items()}


@dataclass(frozen=True, order=True)
class Secret:
    """Where something secret stands: the line (from 1) and its kind. The secret itself is not kept."""

    line: int
    kind: str


def find_secrets(text: str, own: Mapping[str, str] | None = None) -> list[Secret]:
    """Every secret in `text`, by line.

    JSON is looked at as it is written and as it reads: `\\u0068f_…` and `C:\\\\Users` hide nothing.

    Args:
        own: texts that are known to be secret whatever their form, by kind: the token in use, this home folder.
    """
    found = {Secret(_line(text, start), kind) for kind, start in _hits(text, own or {})}
    # A JSON text has no lines of its own once it is parsed, so what only shows there is put at the top.
    kinds = {secret.kind for secret in found}
    inner = {kind for value in _strings(_parsed(text)) for kind, _ in _hits(value, own or {})}
    return sorted(found | {Secret(1, kind) for kind in inner - kinds})


def find_paths(text: str) -> list[str]:
    """Where absolute paths stand in a text of JSON, as a whole entry or within it: the entries, as in `a.b.0`."""
    found: set[str] = set()
    rest: list[tuple[str, Any]] = [("", _parsed(text))]
    while rest:
        place, item = rest.pop()
        if isinstance(item, dict):
            found |= {place for key in item if _holds_path(key)}
            rest += [(f"{place}.{key}", value) for key, value in item.items() if not _holds_path(key)]
        elif isinstance(item, list):
            rest += [(f"{place}.{number}", value) for number, value in enumerate(item)]
        elif isinstance(item, str) and _holds_path(item):
            found.add(place)
    return sorted(place.removeprefix(".") for place in found)


def _holds_path(text: str) -> bool:
    return bool(_ABSOLUTE.match(text) or _WITHIN.search(_ADDRESS.sub(" ", text)))


def _hits(text: str, own: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    for kind, pattern in _PATTERNS.items():
        yield from ((kind, match.start()) for match in pattern.finditer(text))
    for kind, value in own.items():
        if (start := text.find(value)) >= 0:
            yield kind, start


def _line(text: str, start: int) -> int:
    return text.count("\n", 0, start) + 1


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _strings(value: Any) -> Iterator[str]:
    """Every key and every text of parsed JSON."""
    rest: list[Any] = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            rest += _parts(item)
        elif isinstance(item, list):
            rest += item


def _parts(item: Mapping[str, Any]) -> Iterable[Any]:
    return [*item, *item.values()]
