"""`lora-merge evaluate`: its exit codes, what goes to stdout, and one table that holds every model."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lora_merge.cli.evaluate import verdict
from lora_merge.cli.main import main
from tests.evaluation.conftest import adapters, client_on, held_out
from tests.training.conftest import base

__all__ = ["adapters", "base", "held_out"]  # fixtures

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    base: Path,
    adapters: tuple[Path, ...],
    held_out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """`run("--json", data=…)`: exit code, stdout and stderr of a run over the three adapters."""

    def call(*more: str, folders: tuple[Path, ...] = adapters, **changes: str) -> tuple[int, str, str]:
        options = {"base": str(base), "data": str(held_out), "device": "cpu", **changes}
        named = [text for key, value in options.items() for text in (f"--{key}", value)]
        monkeypatch.setattr(sys, "argv", ["lora-merge", "evaluate", *map(str, folders), *named, *more])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


def test_json_is_one_object_on_stdout_and_nothing_else(run: Run) -> None:
    code, out, err = run("--json", "--prompt", "ab", "--max-new-tokens", "2")
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert record["schema_version"] == 1
    assert [model["kind"] for model in record["models"]] == ["base", "local", "local", "mean of locals", "global"]
    assert record["models"][0]["gain_over_base"] is None
    assert set(record["models"][4]["gain_over_mean_of_locals"]) == {"value", "low", "high"}
    assert list(record["answers"][0]["answers"]) == ["base", "org/north", "org/south", "global"]


def test_the_table_shows_every_model_and_whether_merging_was_worth_it(run: Run) -> None:
    code, out, _ = run("--prompt", "ab", "--max-new-tokens", "2")
    assert code == 0
    for name in ("base", "org/north", "org/south", "mean of locals", "global"):
        assert any(line.strip().startswith(f"{name} ") for line in out.splitlines()), name
    assert "the mean of the locals by" in out
    assert "4 held-out rows, " in out
    assert max(len(line) for line in out.splitlines() if line.startswith(" ")) <= 80


def test_an_adapter_beyond_all_bounds_is_told_and_no_bug(
    run: Run, base: Path, adapters: tuple[Path, ...], tmp_path: Path
) -> None:
    def scaled(by: float) -> Path:
        wild = tmp_path / f"{by:g}"
        shutil.copytree(adapters[0], wild)
        tensors = load_file(wild / "adapter_model.safetensors")
        save_file({name: each * by for name, each in tensors.items()}, wild / "adapter_model.safetensors")
        return wild

    head = client_on(base, tmp_path / "head", 3, target_modules=["lm_head"])
    tensors = load_file(head / "adapter_model.safetensors")
    save_file({name: each * 100 for name, each in tensors.items()}, head / "adapter_model.safetensors")
    code, out, _ = run("--json", folders=(head,))
    assert code == 0
    assert json.loads(out)["models"][1]["perplexity"]["value"] == sys.float_info.max
    assert "1.8e+308" in run(folders=(head,))[1]
    code, out, err = run(folders=(adapters[1], scaled(1e30)))
    assert (code, out) == (3, "")
    assert "org/north: loss: is no number on 4 of 4 rows" in err


def test_rows_that_are_too_long_are_told(run: Run) -> None:
    assert "2 held-out rows (2 left out as too long), " in run("--max-length", "10")[1]
    assert "4 held-out rows (2 cut at their end), " in run("--max-length", "15")[1]
    record = json.loads(run("--max-length", "15", "--json")[1])
    assert (record["rows_left_out"], record["rows_cut"]) == (0, 2)


@pytest.mark.parametrize(
    ("low", "value", "high", "sentence"),
    [
        (0.1, 0.2, 0.3, "g beats the mean of the locals by 0.200 [0.100, 0.300]."),
        (-0.1, 0.2, 0.3, "g beats the mean of the locals by 0.200 [-0.100, 0.300], which may be chance."),
        (-0.3, -0.2, -0.1, "g falls short of the mean of the locals by 0.200 [0.100, 0.300]."),
        (-0.3, -0.2, 0.1, "g falls short of the mean of the locals by 0.200 [-0.100, 0.300], which may be chance."),
        (0.0, 0.0, 0.0, "g equals the mean of the locals: 0.000 [0.000, 0.000]."),
        (-1e-9, -1e-9, 0.0, "g equals the mean of the locals: 0.000 [0.000, 0.000]."),
        (-0.1, -0.0004, 0.2, "g equals the mean of the locals: 0.000 [-0.100, 0.200]."),
        (-0.1, -0.01, 0.0, "g falls short of the mean of the locals by 0.010 [0.000, 0.100], which may be chance."),
    ],
)
def test_the_verdict_says_which_is_better_and_how_surely(low: float, value: float, high: float, sentence: str) -> None:
    gain = {"low": low, "value": value, "high": high}
    assert verdict({"name": "g", "gain_over_mean_of_locals": gain}) == sentence


def test_what_is_missing_is_not_found(run: Run, tmp_path: Path) -> None:
    assert run(data=str(tmp_path / "none.jsonl"))[0] == 4
    assert run(base=str(tmp_path / "none"))[0] == 4
    assert run(folders=(tmp_path / "none",))[0] == 4


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({"--base": "nobase"}, 5),
        ({"--base": "./nobase"}, 4),
        ({"--data": "gone.jsonl"}, 4),
        ({"--device": "gpu"}, 2),
        ({"adapter": "gone"}, 4),
    ],
)
def test_a_hopeless_command_loads_no_torch(
    changes: dict[str, str], ends: int, adapters: tuple[Path, ...], base: Path, held_out: Path, tmp_path: Path
) -> None:
    code = (
        "import sys\nfrom lora_merge.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)\n"
    )
    options = {"--base": str(base), "--data": str(held_out)} | changes
    adapter = options.pop("adapter", str(adapters[0]))
    command = [sys.executable, "-c", code, "evaluate", adapter, *(text for pair in options.items() for text in pair)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == f"{ends} False\n", done.stderr


def test_a_base_that_the_hub_would_have_is_a_network_error(run: Run) -> None:
    code, _, err = run(base="org/none")
    assert code == 5
    assert "--base DIR" in err


def test_a_refused_adapter_is_named_and_nothing_is_printed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, out, err = run(folders=(tmp_path / "empty",))
    assert (code, out) == (3, "")
    assert "empty" in err
    code, out, _ = run("--json", folders=(tmp_path / "empty",))
    assert code == 3
    assert json.loads(out)["error"]["problems"]


@pytest.mark.parametrize(
    "option", [("--device", "gpu"), ("--prompt-form", "letter"), ("--limit", "0"), ("--dtype", "int8")]
)
def test_a_wrong_option_is_a_usage_error(run: Run, option: tuple[str, str]) -> None:
    assert run(*option)[0] == 2


def test_a_quoted_glob_names_every_folder_that_it_matches(
    run: Run, adapters: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clients").mkdir()
    for adapter in adapters[:2]:
        shutil.copytree(adapter, tmp_path / "clients" / adapter.name)
    monkeypatch.chdir(tmp_path)
    code, out, err = run("--json", folders=(Path("clients/*"), adapters[2]))
    assert (code, err) == (0, "")
    assert [model["name"] for model in json.loads(out)["models"] if model["kind"] == "local"] == [
        "org/north",
        "org/south",
    ]


def test_rows_that_are_refused_are_told_without_a_word_of_writing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    code, _, err = run(data=str(tmp_path / "none.jsonl"))
    assert code == 3
    assert err.startswith("error: 1 problem in 1 input:\n  none.jsonl: the file: holds no rows")
