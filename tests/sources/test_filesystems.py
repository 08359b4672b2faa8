"""Adapters behind fsspec's URLs, and what kind of place a source names."""

import base64
import contextlib
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lora_merge.errors import NetworkError, NotFoundError, RefusedError, UsageError
from lora_merge.folding.onto import fold
from lora_merge.intake import Reading
from lora_merge.pipeline import aggregate
from lora_merge.screening.stops import Screening
from lora_merge.sources.filesystems import FilesystemRoom, told
from lora_merge.sources.reference import Advance, Candidate
from lora_merge.verify import verify
from lora_merge.watching.events import Arrival
from lora_merge.watching.watch import watch
from tests.conftest import digests
from tests.sources.federation import adapter, write


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """`memory://clients/a` and `b`."""
    filesystem = fsspec.filesystem("memory")
    for i, name in enumerate("ab"):
        for file, content in adapter(f"org/{name}", num_examples=10 * i + 10, seed=i).items():
            filesystem.pipe_file(f"/clients/{name}/{file}", content)
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """The same two as folders."""
    return [
        write(tmp_path / "in" / name, adapter(f"org/{name}", num_examples=10 * i + 10, seed=i))
        for i, name in enumerate("ab")
    ]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files lie in these tests."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return place


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("sources", [["memory://clients/*"], ["memory://clients/b", "memory://clients/a/"]])
def test_urls_give_the_bytes_that_folders_give(
    sources: list[str], folders: list[Path], tmp_path: Path, temporary: Path
) -> None:
    ours = aggregate(sources, tmp_path / "global")
    aggregate(folders, tmp_path / "local")
    weights = "adapter_model.safetensors"
    assert digests(tmp_path / "global")[weights] == digests(tmp_path / "local")[weights]
    recorded = [(entry.source, entry.commit) for entry in ours.ledger.contributions]
    assert recorded == [("memory:///clients/a", None), ("memory:///clients/b", None)]
    assert not list(temporary.iterdir()), "what was fetched is gone"


class Web(SimpleHTTPRequestHandler):
    """Folders as the pages of a server that knows no ranges, for whoever knows the password."""

    def do_GET(self) -> None:
        self._answer(super().do_GET)

    def do_HEAD(self) -> None:
        self._answer(super().do_HEAD)

    def _answer(self, answer: Callable[[], None]) -> None:
        known = "Basic " + base64.b64encode(b"me:hunter2").decode()
        answer() if self.headers["Authorization"] == known else self.send_error(401)

    def log_message(self, *arguments: object) -> None: ...


class Endless(Web):
    """One whose weights files are not as long as it says, but have no end."""

    def copyfile(self, source: BinaryIO, outputfile: BinaryIO) -> None:  # type: ignore[override]
        if self.path.endswith(".safetensors"):
            self.close_connection = True
            while True:
                outputfile.write(bytes(1 << 16))
        super().copyfile(source, outputfile)

    def send_header(self, keyword: str, value: str) -> None:
        endless = self.command == "GET" and self.path.endswith(".safetensors") and keyword == "Content-Length"
        super().send_header("X-Length" if endless else keyword, value)


@pytest.fixture
def serve(folders: list[Path]) -> Iterator[Callable[[type[Web]], str]]:
    """Put `folders` on the web; gives their address, with the password."""
    servers = []

    def start(handler: type[Web]) -> str:
        web = partial(handler, directory=str(folders[0].parent))
        servers.append(server := ThreadingHTTPServer(("127.0.0.1", 0), web))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://me:hunter2@127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_web_server_gives_the_bytes_that_folders_give_and_no_record_its_password(
    serve: Callable[[type[Web]], str], folders: list[Path], tmp_path: Path
) -> None:
    address = serve(Web)
    public = address.replace("me:hunter2@", "")
    made = aggregate([f"{address}/*"], tmp_path / "global")
    aggregate(folders, tmp_path / "local")
    weights = "adapter_model.safetensors"
    assert digests(tmp_path / "global")[weights] == digests(tmp_path / "local")[weights]
    assert [each.source for each in made.ledger.contributions] == [f"{public}/a", f"{public}/b"]
    assert not [path for path in (tmp_path / "global").iterdir() if b"hunter2" in path.read_bytes()]
    only = aggregate([f"{address}/*"], tmp_path / "one", screening=Screening(exclude=[f"{address}/a"]))
    assert [each.client_id for each in only.ledger.contributions] == ["org/b"]
    cached = aggregate(
        [f"simplecache::{address}/*"], tmp_path / "cached", screening=Screening(exclude=[f"{address}/a"])
    )
    assert [each.source for each in cached.ledger.contributions] == [f"{public}/b"]
    with pytest.raises(UsageError, match="needs no cache"):
        aggregate([f"simplecache::file://{folders[0]}"], tmp_path / "no")
    with pytest.raises(NotFoundError) as caught:
        aggregate([f"{address}/none"], tmp_path / "no")
    assert "hunter2" not in str(caught.value)
    with pytest.raises((NetworkError, NotFoundError)):
        aggregate([f"{public}/a"], tmp_path / "no")


class Sorted(Web):
    """One whose pages have more links than those to what is in a folder."""

    def list_directory(self, path: str | os.PathLike[str]) -> None:  # type: ignore[override]
        names = [f"{each.name}/" if each.is_dir() else each.name for each in Path(path).iterdir()]
        links = ["../", "/", "?C=N;O=D", "../b/", "http://127.0.0.1:1/evil/", "//127.0.0.1:1/evil/", "%2e%2e/", *names]
        self.page("".join(f"<A class=x HREF='{link}'>" for link in links).encode())

    def page(self, text: bytes, repeated: float = 1, pause: float = 0) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        with contextlib.suppress(OSError):
            while repeated > 0:
                self.wfile.write(text)
                repeated -= 1
                time.sleep(pause)


class EndlessPage(Sorted):
    def list_directory(self, path: str | os.PathLike[str]) -> None:  # type: ignore[override]
        self.page(b"<a " * 20_000, math.inf)


class SlowPage(Sorted):
    def list_directory(self, path: str | os.PathLike[str]) -> None:  # type: ignore[override]
        self.page(b"<a ", 100, 0.1)


class TanglingPage(Sorted):
    """What fsspec's own expressions take hours for."""

    def list_directory(self, path: str | os.PathLike[str]) -> None:  # type: ignore[override]
        self.page(b"<a " * 300_000)


class SlowFile(Web):
    def copyfile(self, source: BinaryIO, outputfile: BinaryIO) -> None:  # type: ignore[override]
        while self.path.endswith("config.json") and (byte := source.read(1)):
            outputfile.write(byte)
            time.sleep(0.1)
        super().copyfile(source, outputfile)


class Stalling(Web):
    def do_GET(self) -> None:
        time.sleep(5 * self.path.endswith("config.json"))
        super().do_GET()


class NoPages(Web):
    status = 404

    def list_directory(self, path: str | os.PathLike[str]) -> None:  # type: ignore[override]
        self.send_error(self.status)


class Forbidden(NoPages):
    status = 403


class Busy(Web):
    """One that is busy whenever it is asked for a statement, which a client's adapter may also lack."""

    def _answer(self, answer: Callable[[], None]) -> None:
        self.send_error(503) if self.path.endswith("lora_merge.json") else super()._answer(answer)


class NoSizes(Web):
    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Content-Length":
            super().send_header(keyword, value)


def test_of_a_web_page_only_what_is_in_its_folder_is_taken(serve: Callable[[type[Web]], str], tmp_path: Path) -> None:
    address = serve(Sorted)
    made = aggregate([f"{address}/*"], tmp_path / "global")
    assert [each.source.rpartition("/")[2] for each in made.ledger.contributions] == ["a", "b"]


@pytest.mark.parametrize(
    ("server", "error", "said"),
    [
        (EndlessPage, NetworkError, "sends more than 33554432 bytes at once"),
        (TanglingPage, NotFoundError, r"No folder matches http://127.0.0.1:\d+/a\."),
        (SlowPage, NetworkError, "sends too slowly"),
        (SlowFile, NetworkError, "sends too slowly"),
        (Stalling, NetworkError, "[Tt]imeout"),
        (NoPages, NotFoundError, r"No folder matches http://127.0.0.1:\d+/a\."),
        (Forbidden, NotFoundError, "you may not read it: 403, message='Forbidden'"),
        (Busy, NetworkError, "503, message='Service Unavailable'"),
        (NoSizes, RefusedError, "adapter_config.json: is of a size that is not told before it is read"),
    ],
)
def test_a_web_server_that_does_not_do_is_said_and_waited_for_no_longer_than_a_limit(
    server: type[Web],
    error: type[Exception],
    said: str,
    serve: Callable[[type[Web]], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lora_merge.sources.deadline.SECONDS", 0.5)
    monkeypatch.setattr("lora_merge.sources.web.STALLED", 0.5)
    began = time.monotonic()
    with pytest.raises(error, match=said):
        aggregate([f"{serve(server)}/a"], tmp_path / "global")
    assert time.monotonic() - began < 4
    assert not (tmp_path / "global").exists()


def test_a_password_lets_verify_and_a_watch_in_again_and_no_line_tells_it(
    serve: Callable[[type[Web]], str], folders: list[Path], tmp_path: Path
) -> None:
    address, lines = serve(Web), list[str]()
    reading = Reading(tell=lines.append)
    sources, kept_out = [f"{address}/*"], Screening(exclude=[f"{address}/a", f"{address}/nobody"])
    events = list(watch(sources, tmp_path / "global", until=1, screening=kept_out, reading=reading))
    aggregate([f"{address}/a"], tmp_path / "global", force=True)
    events += watch(sources, tmp_path / "global", until=2, reading=reading)
    assert verify(tmp_path / "global", sources, reading=reading).verdict == "identical"
    new = iter([write(tmp_path / "new", adapter("org/a", seed=7, num_examples=30))])

    for path in (tmp_path / "new").iterdir():
        os.utime(path, (path.stat().st_mtime + 2,) * 2)  # a server tells whole seconds

    def replaced(seconds: float) -> None:
        shutil.rmtree(folders[0])
        next(new).rename(folders[0])

    later = watch(sources, tmp_path / "global", reading=reading, wait=replaced)
    events.append(next(event for event in later if isinstance(event, Arrival)))
    assert [event.replaced for event in events if isinstance(event, Arrival)] == [False, False, True]
    with pytest.raises(UsageError, match="nobody is none of the sources") as caught:
        aggregate(sources, tmp_path / "no", screening=kept_out)
    assert "hunter2" not in repr((events, lines, caught.value.message))
    made = aggregate(sources, tmp_path / "one", screening=Screening(exclude=[f"{address}/a"]))
    assert [each.reason for each in made.ledger.left_out] == [f"excluded by {address.replace('me:hunter2@', '')}/a"]
    for path in [*(tmp_path / "global").iterdir(), *(tmp_path / "one").iterdir()]:
        assert b"hunter2" not in path.read_bytes()


def test_a_web_server_that_sends_without_end_is_refused(serve: Callable[[type[Web]], str], tmp_path: Path) -> None:
    address = serve(Endless)
    with pytest.raises(RefusedError):
        aggregate([f"{address}/a"], tmp_path / "global")


def test_an_archive_on_the_web_is_read_though_its_server_knows_no_ranges_and_a_signature_is_not_told(
    serve: Callable[[type[Web]], str], folders: list[Path], tmp_path: Path
) -> None:
    archive = shutil.make_archive(str(tmp_path / "all"), "zip", folders[0].parent)
    shutil.move(archive, folders[0].parent)
    address = serve(Web)
    url = f"zip://*::simplecache::{address}/all.zip?sig=hunter2"
    made = aggregate([url], tmp_path / "global")
    public = address.replace("me:hunter2@", "")
    assert [each.source for each in made.ledger.contributions] == [
        f"zip://{name}::simplecache::{public}/all.zip" for name in "ab"
    ]
    assert verify(tmp_path / "global", [url]).verdict == "identical"
    assert not [path for path in (tmp_path / "global").iterdir() if b"hunter2" in path.read_bytes()]


def test_a_folder_in_an_archive_is_told_by_the_archives_name(folders: list[Path], tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "all"), "zip", folders[0].parent)
    made = aggregate([f"zip://*::{archive}"], tmp_path / "global")
    aggregate(folders, tmp_path / "local")
    weights = "adapter_model.safetensors"
    assert digests(tmp_path / "global")[weights] == digests(tmp_path / "local")[weights]
    assert [each.source for each in made.ledger.contributions] == ["zip://a::all.zip", "zip://b::all.zip"]
    without = aggregate([f"zip://*::{archive}"], tmp_path / "one", screening=Screening(exclude=[f"zip://a::{archive}"]))
    assert [each.reason for each in without.ledger.left_out] == ["excluded by zip://a::all.zip"]
    list(watch([f"zip://*::{archive}"], tmp_path / "one", until=2))
    assert verify(tmp_path / "one", [f"zip://*::{archive}"]).verdict == "identical"
    for path in [*(tmp_path / "global").iterdir(), *(tmp_path / "one").iterdir()]:
        assert str(tmp_path).encode() not in path.read_bytes(), "a record holds no path"


class OneConnection(MemoryFileSystem):
    """A file system that answers one question at a time, as FTP does."""

    protocol = "one"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    asked = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("one://")))

    def _open(self, *arguments: Any, **options: Any) -> Any:
        assert self.asked.acquire(blocking=False), "two at once"
        time.sleep(0.02)
        self.asked.release()
        return super()._open(*arguments, **options)


def test_a_file_system_of_one_connection_is_asked_one_thing_at_a_time(tmp_path: Path) -> None:
    fsspec.register_implementation("one", OneConnection, clobber=True)
    for i in range(8):
        for file, content in adapter(f"org/{i}", num_examples=10, seed=i).items():
            OneConnection().pipe_file(f"/clients/{i}/{file}", content)
    assert len(aggregate(["one://clients/*"], tmp_path / "global").ledger.contributions) == 8


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("ftp://me:hunter2@host:21/a", "ftp://host:21/a"),
        ("ftp://me:hun@ter2@host:21/a", "ftp://host:21/a"),
        ("https://ghp_hunter2@host/a", "https://host/a"),
        ("sftp://me@host/a", "sftp://me@host/a"),
        ("404 of https://me:hunter2@host/a?sig=abc, sorry", "404 of https://host/a sorry"),
        ("zip://a::https://host/b.zip?X-Amz-Signature=abc", "zip://a::https://host/b.zip"),
        ("github://org:repo@main/a", "github://org:repo@main/a"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        ("s3://bucket/what?", "s3://bucket/what?"),
    ],
)
def test_passwords_and_signatures_are_not_told(text: str, wanted: str) -> None:
    assert told(text) == wanted


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("entry", ["memory://clients/a", "memory:///clients/a/", "memory://clients/[a]"])
def test_lists_mean_a_url_however_it_is_written(entry: str, tmp_path: Path) -> None:
    (tmp_path / "allowed").write_text(entry)
    for screening, left in (
        (Screening(exclude=[entry]), "b"),
        (Screening(allow_list=tmp_path / "allowed", skip_rejected=True), "a"),
    ):
        made = aggregate(["memory://clients/*"], tmp_path / left, screening=screening)
        assert [each.client_id for each in made.ledger.contributions] == [f"org/{left}"]


def test_file_urls_and_mixed_places(memory: object, folders: list[Path], tmp_path: Path) -> None:
    for scheme in ("file", "local"):
        ours = aggregate([f"{scheme}://{folders[0]}", "memory://clients/b"], tmp_path / "global", force=True)
        assert [entry.source for entry in ours.ledger.contributions] == [folders[0].name, "memory:///clients/b"]
        assert str(tmp_path) not in (tmp_path / "global" / "lora-merge.lock").read_text(), "a record holds no path"
    both = aggregate([f"file://{folders[0].parent}/*"], tmp_path / "both")
    assert [entry.client_id for entry in both.ledger.contributions] == ["org/a", "org/b"]


def test_a_merged_adapter_is_no_client_wherever_it_lies(
    memory: fsspec.AbstractFileSystem, folders: list[Path], tmp_path: Path
) -> None:
    here = folders[0].parent / "global"
    aggregate(folders, here)
    for path in here.iterdir():
        memory.pipe_file(f"/clients/global/{path.name}", path.read_bytes())
    for place in ("memory://clients", f"file://{here.parent}", str(here.parent)):
        made = aggregate([f"{place}/*"], tmp_path / "again", force=True)
        assert [each.client_id for each in made.ledger.contributions] == ["org/a", "org/b"]
        assert any(f"{place}/* leaves out " in warning for warning in made.warnings)
        with pytest.raises(NotFoundError, match=r"g\* matches only .*global \(a merged adapter\)"):
            aggregate([f"{place}/g*"], tmp_path / "again", force=True)
        with pytest.raises(RefusedError, match=r"aggregation\.json: is that of a merged adapter") as caught:
            aggregate([f"{place}/*", f"{place}/global"], tmp_path / "no", weights="uniform")
        assert "--onto" in caught.value.hint


@pytest.mark.usefixtures("memory")
def test_a_folder_that_is_called_like_a_pattern_is_itself(tmp_path: Path) -> None:
    for number, name in enumerate(("a[1]", "a1", "z")):
        write(tmp_path / name, adapter(f"org/client-{number}", num_examples=10, seed=number))
    made = aggregate([f"file://{tmp_path}/a[1]", str(tmp_path / "z")], tmp_path / "global")
    assert [each.client_id for each in made.ledger.contributions] == ["org/client-0", "org/client-2"]


def test_a_url_that_matches_nothing_is_not_found(tmp_path: Path) -> None:
    for source in ("memory://nobody/*", "memory://clients/c", f"file://{tmp_path}/none"):
        with pytest.raises(NotFoundError, match="No folder matches"):
            aggregate([source], tmp_path / "global")


def test_an_unknown_scheme_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gopher:// cannot be read here"):
        aggregate(["gopher://host/clients/*"], tmp_path / "global")


def test_problems_of_all_are_told_before_anything_is_copied(
    memory: fsspec.AbstractFileSystem, tmp_path: Path, temporary: Path
) -> None:
    memory.pipe_file("/clients/a/adapter_model.safetensors", b"\xff" * 100)
    memory.pipe_file("/clients/b/adapter_config.json", b"{}")
    with pytest.raises(RefusedError) as caught:
        aggregate(["memory://clients/*"], tmp_path / "global")
    assert {problem.client for problem in caught.value.problems} == {"memory:///clients/a", "memory:///clients/b"}
    assert not list(temporary.iterdir())


def test_a_file_that_changes_under_us_is_refused(
    memory: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = memory.cat_file("/clients/a/adapter_model.safetensors")
    honest = FilesystemRoom.fetch

    def late(self: FilesystemRoom, candidate: Candidate, advance: Advance) -> Path:
        memory.pipe_file("/clients/a/adapter_model.safetensors", whole + b"\0")
        return honest(self, candidate, advance)

    monkeypatch.setattr(FilesystemRoom, "fetch", late)
    with pytest.raises(RefusedError, match="changed while it was being read"):
        aggregate(["memory://clients/a"], tmp_path / "global")


def test_a_place_that_fails_is_a_network_error(
    memory: fsspec.AbstractFileSystem, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> bytes:
        raise TimeoutError("no answer")

    monkeypatch.setattr(type(memory), "cat_file", broken)
    with pytest.raises(NetworkError, match="no answer"):
        aggregate(["memory://clients/a"], tmp_path / "global")
    assert not list(temporary.iterdir())


def test_what_a_killed_run_left_is_removed(memory: object, tmp_path: Path, temporary: Path) -> None:
    left = temporary / ".lora-merge.partial-killed"
    left.mkdir()
    aggregate(["memory://clients/*"], tmp_path / "global")
    assert not left.exists()


def test_a_folder_given_by_two_paths_is_refused(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is given twice, as"):
        aggregate([folders[0], folders[0] / ".." / "a"], tmp_path / "global")


def test_below_a_folder_of_this_machine_no_pattern_is_looked_for_on_the_hub_and_a_name_says_that_it_is(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError, match=r"No folder matches in/c\*"):
        aggregate(["in/c*"], tmp_path / "global")
    with pytest.raises(NetworkError) as caught:  # an organisation's name may be that of a folder here
        aggregate(["in/c"], tmp_path / "global")
    assert caught.value.message.startswith("There is no folder in/c here, and the Hub cannot be asked: in/c has to be")
    with pytest.raises(NetworkError, match="There is no folder in/new here, and the Hub") as caught:
        fold(["in/a"], "in/new")
    assert "--onto ./in/new" in caught.value.hint
    assert fold(["in/a"], "./in/new").added == ["org/a"]


def test_a_hub_that_must_not_be_asked_is_a_network_error(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE is set"):
        aggregate(["org/client-0"], tmp_path / "global")


@pytest.mark.parametrize(
    "source",
    [
        *("zip://x::file:///etc/passwd", "tar://x::file:///etc/passwd", "jupyter://x", "reference://x", "dir://x"),
        *("generic://x", "async_wrapper://x", "filecache://x", "blockcache://x::memory://y", "ftp://127.0.0.1:1/x"),
        *("git://x", "data://x", "libarchive://x", "http://127.0.0.1:1/x", "sftp://127.0.0.1:1/x", "nosuch://x"),
    ],
)
def test_whatever_a_file_system_raises_is_said_in_a_sentence(source: str, tmp_path: Path) -> None:
    with pytest.raises((NetworkError, NotFoundError, UsageError)) as caught:
        aggregate([source], tmp_path / "global")
    assert caught.value.message
