"""stdout and stderr as they are found: of any locale, closed, full."""

import io
import os
import sys
from typing import TextIO


def open_streams() -> None:
    """See to it that whatever is printed can be: by its escapes, where a locale has no é; to nowhere, if closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the next file to be opened must not get its place
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard(stream: TextIO) -> None:
    """Send what is left in a stream that cannot be written, and all that follows, to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
