"""`lora-merge export`: its exit codes and what goes to stdout."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_merge.cli.main import main
from tests.evaluation.conftest import adapters
from tests.training.conftest import base

__all__ = ["adapters", "base"]  # fixtures

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    base: Path,
    adapters: tuple[Path, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """`run("--json", adapter=…)`: exit code, stdout and stderr of a run into `tmp_path / "out"`."""

    def call(*more: str, adapter: Path = adapters[2]) -> tuple[int, str, str]:
        options = ["--base", str(base), "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["lora-merge", "export", str(adapter), *options, *more])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


def test_json_tells_what_was_written(run: Run, tmp_path: Path) -> None:
    code, out, err = run("--json")
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert (record["output"], record["dtype"]) == (str(tmp_path / "out"), "fp32")
    assert record["bytes"] > 4 * record["parameters"]


def test_quiet_prints_the_folder_alone(run: Run, tmp_path: Path) -> None:
    assert run("-q") == (0, f"{tmp_path / 'out'}\n", "")


def test_the_size_is_said(run: Run) -> None:
    code, out, _ = run()
    assert code == 0
    assert "M parameters in fp32" in out
    assert "MB" in out


def test_rounding_is_warned_of(run: Run) -> None:
    code, _, err = run("--dtype", "bf16", "-q")
    assert code == 0
    assert "rounds" in err


def test_what_is_there_is_not_replaced_unasked(run: Run) -> None:
    assert [run("-q")[0], run("-q")[0], run("-q", "--force")[0]] == [0, 2, 0]


def test_an_adapter_that_is_not_there_or_is_none_has_its_own_code(run: Run, tmp_path: Path) -> None:
    assert run(adapter=tmp_path / "none")[0] == 4
    (tmp_path / "empty").mkdir()
    assert run(adapter=tmp_path / "empty")[0] == 3
    assert not (tmp_path / "out").exists()
