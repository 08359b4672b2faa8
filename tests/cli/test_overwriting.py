"""No command overwrites what it reads, or what is not its own, whatever --force says."""

import shutil
from pathlib import Path

import pytest

from tests.cli.running import Run, lora_merge
from tests.cli.test_aggregate import client
from tests.conftest import digests
from tests.evaluation.conftest import adapters, held_out
from tests.training.conftest import base

__all__ = ["adapters", "base", "held_out", "lora_merge"]  # fixtures


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def clients(tmp_path: Path) -> Path:
    """in/client-1 and in/client-2."""
    for number in (1, 2):
        client(tmp_path / "in" / f"client-{number}", seed=number)
    return tmp_path / "in"


@pytest.mark.parametrize("output", ["in", "in/client-1", "in/client-1/global", "in/../in/client-2", "."])
@pytest.mark.parametrize("more", [(), ("--exclude", "in/client-1")])
def test_aggregate_never_writes_over_its_inputs(
    output: str, more: tuple[str, ...], clients: Path, lora_merge: Run
) -> None:
    before = everything(clients)
    code, _, err = lora_merge("aggregate", "in/*", "--output", output, "--force", "-q", *more)
    assert code == 2
    assert "the input" in err
    assert everything(clients) == before


def test_aggregate_replaces_its_own_result_and_no_other_thing(clients: Path, lora_merge: Run, tmp_path: Path) -> None:
    assert lora_merge("aggregate", "in/*", "-o", "global", "-q")[0] == 0
    assert lora_merge("aggregate", "in/*", "-o", "global", "-q", "--force")[0] == 0
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "thesis.txt").write_text("years")
    (tmp_path / "rows.jsonl").write_text("{}")
    for output in ("project", "rows.jsonl"):
        code, _, err = lora_merge("aggregate", "in/*", "-o", output, "--force")
        assert code == 2
        assert "--force" in err
    assert (tmp_path / "project" / "thesis.txt").read_text() == "years"
    assert (tmp_path / "rows.jsonl").read_text() == "{}"
    assert clients.is_dir()


@pytest.mark.parametrize("stated", [True, False], ids=["trained by us", "anybody's"])
@pytest.mark.parametrize("more", [("in/*",), ("in/*", "--onto", "new"), ("in/client-2", "--onto", "global")])
def test_aggregate_never_replaces_a_clients_adapter(
    more: tuple[str, ...], stated: bool, clients: Path, lora_merge: Run, tmp_path: Path
) -> None:
    assert lora_merge("aggregate", "in/client-1", "-o", "global", "-q")[0] == 0
    work = client(tmp_path / "work", seed=3, num_examples=10 if stated else None)
    before = everything(tmp_path)
    code, _, err = lora_merge("aggregate", *more, "-o", str(work), "--force")
    assert code == 2
    assert "not a merged adapter alone" in err
    assert everything(tmp_path) == before
    assert clients.is_dir()


def test_a_fold_replaces_its_own_global_and_never_an_arrival(clients: Path, lora_merge: Run, tmp_path: Path) -> None:
    assert lora_merge("aggregate", "in/*", "-o", "global", "-q")[0] == 0
    client(tmp_path / "late", seed=3)
    assert lora_merge("aggregate", "late", "--onto", "global", "-q")[0] == 0
    before = everything(clients)
    code, _, err = lora_merge("aggregate", "late", "in/*", "--onto", "global", "-o", "in/client-1", "--force")
    assert code == 2
    assert "is the input" in err
    assert everything(clients) == before


def test_locked_makes_its_own_output_again_without_force(clients: Path, lora_merge: Run, tmp_path: Path) -> None:
    assert clients.is_dir()
    assert lora_merge("aggregate", "in/*", "-o", "global", "-q")[0] == 0
    before = digests(tmp_path / "global")
    assert lora_merge("aggregate", "in/*", "-o", "global", "-q", "--locked")[0] == 0
    assert digests(tmp_path / "global") == before
    assert lora_merge("aggregate", "in/client-1", "-o", "global", "-q", "--locked")[0] == 8
    assert digests(tmp_path / "global") == before


def test_export_never_writes_over_what_it_reads_or_what_is_no_model(
    base: Path, adapters: tuple[Path, ...], lora_merge: Run, tmp_path: Path
) -> None:
    model, adapter = shutil.copytree(base, tmp_path / "base"), shutil.copytree(adapters[2], tmp_path / "global")
    other = shutil.copytree(adapters[0], tmp_path / "other")
    before = everything(tmp_path)
    for output in (model, adapter, adapter / "model", tmp_path, other):
        code, _, err = lora_merge("export", "global", "--base", "base", "-o", str(output), "--force")
        assert code == 2
        assert "the input" in err or "leaves it alone" in err
    assert everything(tmp_path) == before


def test_evaluate_replaces_nothing_but_an_evaluation_and_that_only_by_force(
    base: Path, adapters: tuple[Path, ...], held_out: Path, lora_merge: Run, tmp_path: Path
) -> None:
    rows = Path(shutil.copy(held_out, tmp_path / "rows.jsonl"))
    (tmp_path / "notes.json").write_text("{}")
    before = everything(tmp_path)
    run = ("evaluate", str(adapters[2]), "--base", str(base), "--data", str(rows), "--device", "cpu", "-q")
    for output in (rows, tmp_path / "notes.json", adapters[2] / "new.json", base / "new.json", tmp_path):
        code, _, err = lora_merge(*run, "-o", str(output), "--force")
        assert code == 2, output
        assert "the input" in err or "no evaluation" in err
    assert everything(tmp_path) == before
    (tmp_path / "deep.json").write_text("[" * 100_000)
    assert "no evaluation" in lora_merge(*run, "-o", "deep.json", "--force")[2]
    assert lora_merge(*run, "-o", "new/made.json")[:2] == (0, "new/made.json\n")
    assert [lora_merge(*run, "-o", "new/made.json", *more)[0] for more in ((), ("--force",))] == [2, 0]


def test_evaluate_says_what_it_found_even_where_it_cannot_be_written(
    base: Path,
    adapters: tuple[Path, ...],
    held_out: Path,
    lora_merge: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run = ("evaluate", str(adapters[2]), "--base", str(base), "--data", str(held_out), "--device", "cpu")
    (tmp_path / "file").touch()
    assert lora_merge(*run, "-o", "file/made.json")[:2] == (7, "")
    monkeypatch.setattr("os.replace", full)
    code, out, err = lora_merge(*run, "-o", "made.json")
    assert code == 7
    assert "nats a token" in out
    assert "No space left" in err
    code, out, err = lora_merge(*run, "-o", "made.json", "--json")
    assert code == 7
    assert '"models"' in out
    assert out.count("schema_version") == 1
    assert "No space left" in err
    code, out, err = lora_merge(*run, "-o", "made.json", "-q")
    assert (code, out) == (7, "")  # nothing was made
    assert "error: made.json could not be written: No space left" in err
    assert list(tmp_path.glob("*made.json*")) == []


def test_a_demo_never_removes_what_no_demo_made(base: Path, lora_merge: Run, tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    (demo / "clients").mkdir(parents=True)
    (demo / "demo.json").write_text("{}")
    (demo / "clients" / "thesis.txt").write_text("years")
    model = shutil.copytree(base, demo / "global" / "base")
    before = everything(tmp_path)
    for chosen, said in ((base, "leaves it alone"), (model, "contains the input")):
        code, _, err = lora_merge("demo", "--output", "demo", "--base", str(chosen), "--force")
        assert code == 2
        assert said in err
    assert everything(tmp_path) == before
