"""The one output sink: results to stdout, talk to stderr, errors to a sentence and an exit code.

Nothing that came from a file or a stranger reaches the terminal unless it went through `printable`.
"""

import json
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_merge.cli.narrow import ENDLESS, fitted
from lora_merge.cli.settings_file import set_elsewhere
from lora_merge.cli.streams import discard, open_streams
from lora_merge.errors import LoraMergeError, RefusedError, StorageError, UsageError, one_line
from lora_merge.interrupts import keyboard_interrupts

if TYPE_CHECKING:  # rich is imported where something is drawn: --help draws nothing with it
    from rich.console import Console, RenderableType
    from rich.text import Text

SCHEMA_VERSION = 1

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, also on failure.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only what was made; warnings stay on stderr.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="On an error, print the traceback.")]


def printable(text: object) -> str:
    """`text`, of one or many lines, with every other control and formatting character shown as an escape."""
    return "\n".join(one_line(line) for line in str(text).split("\n"))


def plain(text: object) -> "Text":
    """A rich text that is neither markup nor a control sequence, whatever `text` holds."""
    from rich.text import Text

    return Text(printable(text))


@dataclass
class Output:
    """Where one command's words go. Built from ``--json``, ``--quiet`` and ``--debug``.

    With `lines`, each object of ``--json`` is one line: of a command that prints several.
    """

    as_json: bool = False
    quiet: bool = False
    debug: bool = False
    lines: bool = False

    def __post_init__(self) -> None:
        open_streams()
        self._spoken = False  # whether stdout has its one object, or could not be written

    @cached_property
    def _stdout(self) -> "Console":
        from rich.console import Console

        # Off a terminal rich would wrap tables at 80 columns; a pipe has no width.
        return Console(width=None if sys.stdout.isatty() else ENDLESS, highlight=False)

    @cached_property
    def _stderr(self) -> "Console":
        from rich.console import Console

        return Console(stderr=True, highlight=False, soft_wrap=True)

    def result(
        self,
        data: dict[str, Any],
        *,
        made: str | Sequence[str] = "",
        show: "Callable[[], RenderableType] | None" = None,
    ) -> None:
        """Print the result: `data` under ``--json``, `made` (a line each) under ``-q``, else what `show` draws.

        A text is printed as it is, also on a terminal: rich would break its lines, and what is copied would be no file.
        """
        if self.as_json:
            self._write(self._object(data))
            self._spoken = True
        elif self.quiet:
            self._write("".join(one_line(line) + "\n" for line in ([made] if isinstance(made, str) else made)))
        elif show is not None:
            drawn = show()
            if isinstance(drawn, str):
                self._write(printable(drawn) + "\n")
                return
            drawn = fitted(drawn, self._stdout)
            with self._to_stdout(), self._stdout.capture() as capture:
                self._stdout.print(drawn)
            self._write("".join(line.rstrip() + "\n" for line in capture.get().split("\n")[:-1]))

    def event(self, data: dict[str, Any], *lines: str) -> None:
        """Print one of several results: `data` under ``--json``, nothing under ``-q``, else its `lines`."""
        if self.as_json:
            self._write(self._object(data))
        elif not self.quiet:
            self._write("".join(one_line(line).rstrip() + "\n" for line in lines))

    @property
    def columns(self) -> int:
        """How wide a line of the results may be: as the terminal is, or without end in a pipe."""
        return self._stdout.width

    def say(self, text: object = "") -> None:
        """A line of talk, to stderr; silent under ``-q`` and ``--json``."""
        if not (self.quiet or self.as_json):
            self._talk(one_line(text))

    def warn(self, text: object) -> None:
        """A warning, to stderr, in every mode."""
        self._talk(one_line(text), "warning: ", "yellow")

    @contextmanager
    def progress(self, what: str, total: int | None, unit: str = "") -> Iterator[Callable[[int], None]]:
        """A bar on stderr with rate and time left, and nothing off a terminal; yields ``advance(steps)``."""
        if self.quiet or self.as_json or not self._stderr.is_terminal:
            yield lambda steps: None
            return
        from lora_merge.cli.bar import bar_of

        with bar_of(self._stderr, unit) as bar:
            task = bar.add_task(one_line(what), total=total)
            yield lambda steps: bar.advance(task, steps)

    @contextmanager
    def reporting(self, resume: str = "") -> Iterator[None]:
        """Turn what a command raises into a sentence and its documented exit code.

        `resume` is what to say after Ctrl-C: the command that goes on from here.
        """
        try:
            with keyboard_interrupts():
                yield
        except LoraMergeError as error:
            where = set_elsewhere(error.message) if error.exit_code == UsageError.exit_code else ""
            self._fail(
                error.exit_code, error.message, f"{where}. {error.hint}".strip(". ") if where else error.hint, error
            )
        except KeyboardInterrupt as error:
            self._fail(130, "Interrupted; nothing half-written was left.", resume, error)
        except OSError as error:
            code = 4 if isinstance(error, PermissionError) else 7
            self._fail(code, one_line(f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")), "", error)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            hint = "This is a bug of lora-merge: please report it with what --debug prints."
            self._fail(1, one_line(f"{type(error).__name__}: {error}"), hint, error)

    def usage_error(self, message: str, hint: str = "lora-merge --help") -> None:
        """Say that the command line itself is wrong."""
        if self.as_json:
            self._write(self._object({"error": {"code": UsageError.exit_code, "message": message, "hint": hint}}))
            return
        self._talk(one_line(message), "error: ", "bold red")
        self._talk(one_line(hint), "hint: ", "cyan")

    def _object(self, data: dict[str, Any]) -> str:
        indent = None if self.lines else 2
        return json.dumps({"schema_version": SCHEMA_VERSION, **data}, indent=indent, allow_nan=False) + "\n"

    def _write(self, text: str) -> None:
        with self._to_stdout():
            sys.stdout.write(text)
            sys.stdout.flush()

    @contextmanager
    def _to_stdout(self) -> Iterator[None]:
        """A stdout that cannot be written is a `StorageError`, and discarded: the interpreter flushes it at its end."""
        try:
            yield
        except OSError as error:
            discard(sys.stdout)
            self._spoken = True
            raise StorageError(f"The result could not be written to standard output: {error.strerror}.") from error

    def _talk(self, text: str, label: str = "", style: str = "") -> None:
        from rich.text import Text

        try:
            with self._stderr.capture() as capture:
                self._stderr.print(Text(label, style=style) + Text(printable(text)))
            self._stderr.file.write(capture.get())
            self._stderr.file.flush()
        except OSError:  # nobody listens: no reason to stop the work
            discard(sys.stderr)

    def _fail(self, code: int, message: str, hint: str, error: BaseException) -> None:
        if self.debug:
            self._talk(textwrap.indent("".join(traceback.format_exception(error)), "  "))
        if self.as_json and not self._spoken:
            record: dict[str, Any] = {"code": code, "message": message, "hint": hint}
            if isinstance(error, RefusedError):
                record["problems"] = [vars(problem) for problem in error.problems]
            with suppress(StorageError):
                self._write(self._object({"error": record}))
                raise typer.Exit(code)
        self._talk(message, "error: ", "bold red")
        if hint:
            self._talk(one_line(hint), "hint: ", "cyan")
        raise typer.Exit(code)
