"""Who holds what in the demo: an area of the standard library a client, some modules of each kept for evaluation.

A module is a path below the standard library's folder: a file, or a package with all that is in it. Paths that a
Python version lacks are passed over.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Area:
    """One client's part of the standard library: modules to train on, and others that all models are judged by."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


AREAS = (
    Area(
        "networking",
        train=(
            *("http", "imaplib.py", "ipaddress.py", "netrc.py", "smtplib.py", "socket.py", "ssl.py", "urllib"),
            *("webbrowser.py", "wsgiref", "xmlrpc/client.py"),
        ),
        held_out=("ftplib.py", "poplib.py", "socketserver.py", "xmlrpc/server.py"),
    ),
    Area(
        "text",
        train=(
            *("_strptime.py", "argparse.py", "ast.py", "cmd.py", "codecs.py", "fnmatch.py", "getopt.py", "gettext.py"),
            *("html", "inspect.py", "optparse.py", "pprint.py", "pydoc.py", "re", "reprlib.py", "string.py"),
            *("tokenize.py", "traceback.py"),
        ),
        held_out=("calendar.py", "difflib.py", "locale.py", "shlex.py", "textwrap.py"),
    ),
    Area(
        "concurrency",
        train=(
            *("asyncio/base_events.py", "asyncio/events.py", "asyncio/futures.py", "asyncio/runners.py"),
            *("asyncio/selector_events.py", "asyncio/sslproto.py", "asyncio/streams.py", "asyncio/tasks.py"),
            *("asyncio/transports.py", "asyncio/unix_events.py", "concurrent", "contextlib.py", "multiprocessing"),
            *("sched.py", "selectors.py", "signal.py", "threading.py", "weakref.py"),
        ),
        held_out=("asyncio/locks.py", "asyncio/queues.py", "asyncio/timeouts.py", "queue.py", "subprocess.py"),
    ),
    Area(
        "data-formats",
        train=(
            *("_pydatetime.py", "_pydecimal.py", "base64.py", "bz2.py", "csv.py", "datetime.py", "email", "gzip.py"),
            *("json", "lzma.py", "mailbox.py", "pickle.py", "pickletools.py", "plistlib.py", "sqlite3"),
            *("statistics.py", "uuid.py", "xml", "zipfile", "zipfile.py"),
        ),
        held_out=("configparser.py", "fractions.py", "shelve.py", "tarfile.py", "tomllib"),
    ),
)
