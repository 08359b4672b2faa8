"""Every error that lora-merge raises on purpose, and the exit code that each one means.

LoraMergeError              1  a bug of ours, when raised bare
├── UsageError              2  the command or its configuration is wrong
│   └── MissingBaseError    2  the answer needs tensors of the base model, and they are not at hand
├── RefusedError            3  an input was read and refused; carries every problem of every client
├── NotFoundError           4  nothing there, or no access to it
├── NetworkError            5  the network failed; trying again may help
├── ConflictError           6  somebody else changed what was to be changed
├── StorageError            7  the disk or the local file system failed
└── VerificationError       8  what is there is not what it was said to be

An error says what is wrong, in whose input, and (in ``hint``) what to do next.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


def one_line(text: object) -> str:
    """`text` with every control and formatting character as an escape.

    A name that a stranger chose then neither drives a terminal nor forges a line of its own.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text))


def meant(word: str, words: Iterable[str]) -> str:
    """` (did you mean …?)`, with the one of `words` that is near to `word`; else nothing."""
    near = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


class LoraMergeError(Exception):
    """The root. ``message`` says what and who; ``hint`` says what to do next, or is empty.

    A message is one line, whatever names it holds; ``more`` are further lines of it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", more: Sequence[str] = ()) -> None:
        self.message = "\n".join(map(one_line, (message, *more)))
        super().__init__(self.message)
        self.hint = hint


class UsageError(LoraMergeError):
    """The command or its configuration is wrong; no input was judged."""

    exit_code = 2


class MissingBaseError(UsageError):
    """The exact answer needs base tensors that were not found. ``tensors`` names them."""

    def __init__(self, tensors: Sequence[str], *, why: str) -> None:
        shown = ", ".join(tensors[:5]) + (f" and {len(tensors) - 5} more" if len(tensors) > 5 else "")
        super().__init__(
            f"{why}: needs {shown} of the base model.",
            hint="Give the base model with --base FOLDER (or its repository id, if it is in the local cache).",
        )
        self.tensors = tuple(tensors)


class Malformed(ValueError):
    """A file's text breaks its form: ``field`` says where in it, ``reason`` why. Its reader makes it a `Problem`."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


@dataclass(frozen=True, order=True)
class Problem:
    """One reason to refuse one client: ``client`` and ``field`` say where, ``reason`` says why."""

    client: str
    field: str
    reason: str

    def __str__(self) -> str:
        return one_line(f"{self.client}: {self.field}: {self.reason}")


ALL_CLIENTS = "all clients"  # the client of a problem that is no single one's
_BASES = ("base_model.repo", "base_model.weights_sha256", "base_model_name_or_path")  # what explains much else: first
MAX_SHOWN = 40
MOST_ALIKE = 3  # so many of one client with one reason are listed each; more are one line


class RefusedError(LoraMergeError):
    """One or more inputs were refused. ``problems`` holds all of them, sorted; the message shows the first."""

    exit_code = 3

    def __init__(self, problems: Sequence[Problem], *, hint: str = "") -> None:
        self.problems = tuple(sorted(set(problems), key=_by_number))
        clients = {problem.client for problem in self.problems}
        count, inputs = len(self.problems), len(clients - {ALL_CLIENTS})
        places = [f"in {inputs} input{'s' * (inputs > 1)}"] * (inputs > 0)
        places += ["of all clients together"] * (ALL_CLIENTS in clients)
        lead = f"{count} problem{'s' * (count > 1)} {' and '.join(places)}:"
        lines = _lines(self.problems)
        shown = [f"  {line}" for line in lines[:MAX_SHOWN]]
        if len(lines) > MAX_SHOWN:
            shown.append(f"  and {len(lines) - MAX_SHOWN} more (--json lists all of them)")
        super().__init__(lead, hint=hint, more=shown)


def _by_number(problem: Problem) -> list[list[str | int]]:
    """Sorts a client's base model before its modules, and `line 9` before `line 10`.

    Every second part of a text is a number, so that like is compared with like.
    """
    texts = (problem.client, problem.field, problem.reason)
    client, *others = [
        [int(p) if i % 2 else p for i, p in enumerate(re.split("([0-9]{1,18})", text))] for text in texts
    ]
    return [client, [int(problem.field not in _BASES)], *others]


def _lines(problems: Sequence[Problem]) -> list[str]:
    """A line for each problem; those of one client with one reason, as of every module, are one with an example."""
    alike: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        alike.setdefault((problem.client, problem.reason), []).append(problem)
    lines = list[str]()
    for (client, reason), some in alike.items():
        if len(some) <= MOST_ALIKE:
            lines += map(str, some)
        else:
            lines.append(one_line(f"{client}: {some[0].field} and {len(some) - 1} more: {reason}"))
    return lines


class Refusals:
    """Collects refusals, so that whoever mends an input learns of all that is wrong with it at once."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._hints: dict[str, None] = {}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Go on after a refusal, and remember it."""
        try:
            yield
        except RefusedError as error:
            self.problems += error.problems
            self._hints |= {error.hint: None} if error.hint else {}

    @property
    def hint(self) -> str:
        """What to do about them all."""
        return " ".join(self._hints)

    def require_none(self) -> None:
        """Raise `RefusedError` with all that was noted."""
        if self.problems:
            raise RefusedError(self.problems, hint=self.hint)


class NotFoundError(LoraMergeError):
    """Nothing is there, or it may not be read."""

    exit_code = 4


class NetworkError(LoraMergeError):
    """The network failed; the same command may work later."""

    exit_code = 5


class ConflictError(LoraMergeError):
    """Somebody else changed, or made, what this run was about to change.

    What was there before the run began is none: an output that is taken is a `UsageError`.
    """

    exit_code = 6


class StorageError(LoraMergeError):
    """The local disk or file system failed."""

    exit_code = 7


class VerificationError(LoraMergeError):
    """What is there is not what it was said, sent or locked to be."""

    exit_code = 8
