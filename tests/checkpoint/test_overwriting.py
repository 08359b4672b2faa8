"""What --force may replace: a result of its own kind, whole and alone; and nothing ever that is read."""

import fcntl
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lora_merge.checkpoint import folder
from lora_merge.checkpoint.folder import atomic_folder, check_free, scratch_folder, write_file
from lora_merge.checkpoint.overwriting import Kind, require_apart
from lora_merge.errors import ConflictError, StorageError, UsageError
from lora_merge.ledger import Certificate, Contribution, Ledger

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
MODEL = ("config.json", "model.safetensors", "tokenizer.json")
MERGED = (*ADAPTER, "aggregation.json")
GLOBAL = (*MERGED, "README.md", "aggregation_core.safetensors", "lora-merge.lock")


LEDGER = Ledger(
    method="exact",
    options={},
    global_lr=1.0,
    weighting="uniform",
    total_weight=1.0,
    base_model=None,
    contributions=[Contribution("org/a", "a", None, 1.0, 1.0, None, {"adapter_model.safetensors": "0" * 64})],
    certificate=Certificate("off"),
    forms={},
    ranks=[],
    dtype="fp32",
    device="cpu",
    versions={},
)


def folder_of(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text(LEDGER.to_json() if name == "aggregation.json" else "old")
    return folder


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("merged", MERGED),
        ("merged", GLOBAL),
        ("merged", (*GLOBAL, "tokenizer.json", ".gitattributes")),
        ("client", ADAPTER),
        ("client", (*ADAPTER, "lora_merge.json", "tokenizer.json", ".gitattributes")),
        ("client", ("adapter_config.json", "adapter_model.bin")),
        ("model", MODEL),
        ("model", ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json")),
        ("rows", ("held-out.jsonl", "text.jsonl")),
        ("merged", ()),
    ],
)
def test_a_result_of_its_kind_is_replaced(kind: Kind, names: tuple[str, ...], tmp_path: Path) -> None:
    output = folder_of(tmp_path / "out", *names)
    with atomic_folder(output, force=True, kind=kind) as work:
        (work / "new").touch()
    assert [path.name for path in output.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("merged", ("thesis.txt",)),
        ("merged", ("README.md",)),
        ("merged", ("adapter_config.json",)),
        ("merged", ("aggregation.json",)),
        ("merged", (*MERGED, "thesis.txt")),
        ("merged", (*MERGED, "optimizer.pt")),
        ("merged", ADAPTER),
        ("merged", (*ADAPTER, "lora_merge.json")),
        ("merged", (*MERGED, "lora_merge.json")),
        ("merged", MODEL),
        ("client", GLOBAL),
        ("client", ("adapter_config.json",)),
        ("client", (*ADAPTER, "optimizer.pt")),
        ("model", GLOBAL),
        ("model", ("config.json",)),
        ("rows", ("mine.jsonl",)),
    ],
)
def test_anything_else_is_left_alone_even_with_force(kind: Kind, names: tuple[str, ...], tmp_path: Path) -> None:
    output = folder_of(tmp_path / "out", *names)
    with pytest.raises(UsageError, match="leaves it alone"), atomic_folder(output, force=True, kind=kind):
        pass
    assert sorted(path.name for path in output.iterdir()) == sorted(names)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema_version": 1}'])
def test_what_has_no_record_that_can_be_read_is_no_merged_adapter(text: str, tmp_path: Path) -> None:
    output = folder_of(tmp_path / "out", *MERGED)
    (output / "aggregation.json").write_text(text)
    with pytest.raises(UsageError, match=r"holds aggregation\.json, .*leaves it alone"):
        check_free(output, force=True)


def test_a_folder_or_a_link_inside_is_not_ours(tmp_path: Path) -> None:
    (folder_of(tmp_path / "a", *MERGED) / "checkpoint-1").mkdir()
    (folder_of(tmp_path / "b", *MERGED) / "README.md").symlink_to(tmp_path)
    for name in ("a", "b"):
        with pytest.raises(UsageError, match="leaves it alone"):
            check_free(tmp_path / name, force=True)


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    with pytest.raises(UsageError, match="not a folder"), atomic_folder(rows, force=True):
        pass
    assert rows.read_text() == "{}"


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    folder_of(tmp_path / "first", *MERGED)
    (tmp_path / "latest").symlink_to("first")
    with atomic_folder(tmp_path / "latest", force=True) as work:
        (work / "new").touch()
    assert (tmp_path / "latest").is_symlink()
    assert [path.name for path in (tmp_path / "first").iterdir()] == ["new"]


@pytest.mark.parametrize(
    ("output", "relation"),
    [
        ("in/a", "is"),
        ("in/a/", "is"),
        ("in/b/../a", "is"),
        ("link", "is"),
        ("in/a/global", "lies in"),
        ("link/new/global", "lies in"),
        ("in", "contains"),
        (".", "contains"),
    ],
)
def test_an_output_is_apart_from_every_input(
    output: str, relation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "in")
    folder_of(tmp_path / "in" / "a", *ADAPTER)
    folder_of(tmp_path / "in" / "b", *ADAPTER)
    (tmp_path / "link").symlink_to("in/a")
    with pytest.raises(UsageError, match=f"{relation} the input in/a"):
        require_apart(Path(output), [Path("in/a"), Path("in/b")])


@pytest.mark.parametrize("output", ["global", "in/global", "in/a2"])
def test_a_place_beside_the_inputs_is_free(output: str, tmp_path: Path) -> None:
    require_apart(tmp_path / output, [tmp_path / "in" / "a"])


@pytest.mark.parametrize("output", ["in/a/sub", "in/a/new/sub", "link/sub"])
def test_nothing_is_written_into_an_adapters_folder(output: str, tmp_path: Path) -> None:
    folder_of(tmp_path / "in")
    folder_of(tmp_path / "in" / "a", *ADAPTER)
    (tmp_path / "link").symlink_to("in/a")
    for kind in ("merged", "client", "model"):
        with pytest.raises(UsageError, match="in/a, which is an adapter"):
            check_free(tmp_path / output, kind=kind)
    assert sorted(path.name for path in (tmp_path / "in" / "a").iterdir()) == sorted(ADAPTER)
    check_free(tmp_path / "in" / "a", force=True, kind="client")


def test_a_place_that_cannot_be_written_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="is not a folder"):
        check_free(tmp_path / "file" / "out")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(StorageError, match="may not be written"):
        check_free(tmp_path / "new" / "out")


def test_a_scratch_folder_can_be_written_in_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_folder() as scratch, atomic_folder(scratch / "again") as work:
        (work / "new").touch()
    assert list(tmp_path.iterdir()) == []


def test_of_files_that_are_written_at_once_one_is_there_whole_and_no_other(tmp_path: Path) -> None:
    path, texts = tmp_path / "new" / "file", [str(number) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(len(texts)) as threads:
        for _ in threads.map(lambda text: write_file(path, text), texts):
            assert path.read_text() in texts
    assert [each.name for each in path.parent.iterdir()] == ["file"]


def test_a_link_that_lies_where_a_file_is_written_beside_is_not_written_through(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    other.write_text("theirs")
    for name in (".file.partial", f".file.partial-{os.getpid()}"):
        (tmp_path / name).symlink_to(other)
    mask = os.umask(0o027)
    try:
        write_file(path, "ours")
    finally:
        os.umask(mask)
    assert (path.read_text(), path.stat().st_mode & 0o777, other.read_text()) == ("ours", 0o640, "theirs")


@pytest.mark.parametrize("name", ["x" * 255, "🦙" * 63])
def test_a_name_may_be_as_long_as_the_file_system_takes(name: str, tmp_path: Path) -> None:
    for force in (False, True):
        with atomic_folder(folder_of(tmp_path / name, *MERGED) if force else tmp_path / name, force=force) as work:
            (work / "new").touch()
        assert [path.name for path in (tmp_path / name).iterdir()] == ["new"]
        (tmp_path / name / "new").unlink()
        (tmp_path / name).rmdir()
    write_file(tmp_path / name, "text")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("output", ["x" * 256, f"new/{'x' * 256}", f"{'x' * 256}/new", "new/" * 1500 + "new"])
def test_a_longer_name_is_said_to_be_before_the_work(output: str, tmp_path: Path) -> None:
    for force in (False, True):
        with pytest.raises(UsageError, match="too long for the file system"):
            check_free(tmp_path / output, force=force)
    assert list(tmp_path.iterdir()) == []


def test_long_names_that_begin_alike_are_two_runs_places(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / ("x" * 240 + "1")) as one, atomic_folder(tmp_path / ("x" * 240 + "2")) as other:
        assert one.is_dir()
        assert other.is_dir()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "error", [StorageError("no room"), KeyboardInterrupt()], ids=lambda error: type(error).__name__
)
def test_what_fails_leaves_no_new_parents_but_those_that_somebody_uses(error: BaseException, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()

    def fail(output: str) -> None:
        with atomic_folder(tmp_path / output):
            if output.startswith("used"):
                (tmp_path / "used" / "thesis.txt").touch()
            raise error

    for output in ("there/out", "new/deep/out", "used/deep/out"):
        with pytest.raises(type(error)):
            fail(output)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "there",
        "used",
        "used/thesis.txt",
    ]


def test_runs_that_fail_take_no_folder_away_from_those_that_begin(tmp_path: Path) -> None:
    def run(number: int) -> None:
        for _ in range(50):
            with suppress(StorageError), atomic_folder(tmp_path / "new" / "deep" / str(number)):
                raise StorageError("no room")

    with ThreadPoolExecutor(4) as threads:
        failing = [threads.submit(run, number) for number in range(3)]
        for number in range(50):
            with atomic_folder(tmp_path / "new" / "deep" / f"made-{number}"):
                pass
            if not failing[0].done() and number % 2:
                shutil.rmtree(tmp_path / "new" / "deep" / f"made-{number}")
        for each in failing:
            each.result()
    assert sorted(path.name for path in (tmp_path / "new" / "deep").iterdir())[0].startswith("made-")


def test_a_lock_that_another_program_holds_is_waited_for_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_SECONDS_OF_SILENCE", 0.1)
    theirs, said = os.open(tmp_path, os.O_RDONLY), list[str]()
    fcntl.flock(theirs, fcntl.LOCK_EX)
    threading.Timer(0.5, os.close, [theirs]).start()
    with atomic_folder(tmp_path / "out", tell=said.append) as work:
        (work / "new").touch()
    assert said == [f"Waiting for another program that has {tmp_path} locked."]
    said.clear()
    with atomic_folder(tmp_path / "other", tell=said.append):
        pass
    assert said == []


@pytest.mark.parametrize("late", [False, True], ids=["before the last look", "after it"])
def test_what_somebody_makes_meanwhile_is_left_as_it_is(
    late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, looked = tmp_path / "global", list[Path]()

    def make() -> None:
        output.mkdir()
        (output / "theirs").write_text("precious")

    def look_and_make(path: Path, **options: Any) -> None:
        check_free(path, **options)
        looked.append(path)
        if late and len(looked) == 2:
            make()

    def write() -> None:
        with atomic_folder(output) as work:
            (work / "ours").write_text("new")
            if not late:
                make()

    monkeypatch.setattr(folder, "check_free", look_and_make)
    with pytest.raises(ConflictError, match="in the meantime"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["global"]
    assert (output / "theirs").read_text() == "precious"


def test_what_is_there_after_the_callers_look_was_made_meanwhile(tmp_path: Path) -> None:
    output = folder_of(tmp_path / "out", *MERGED)
    for looked, error in ((False, UsageError), (True, ConflictError)):
        with pytest.raises(error), atomic_folder(output, looked=looked):
            pass
