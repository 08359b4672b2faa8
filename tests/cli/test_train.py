"""`lora-merge train`: its exit codes, what goes to stdout, and that its errors come before any model is loaded."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_merge.cli.main import main
from lora_merge.recipe_files import folder
from tests.training.conftest import LIBRARY_WARNINGS, MakeRecipe, base, make_recipe, rows

__all__ = ["base", "make_recipe", "rows"]  # fixtures

pytestmark = LIBRARY_WARNINGS

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    base: Path,
    rows: Path,
    make_recipe: MakeRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """`run("--json", data=…, base=None)`: exit code, stdout and stderr of a run into `tmp_path / "out"`."""

    def call(*more: str, **changes: str | None) -> tuple[int, str, str]:
        options = {"data": str(rows), "client-id": "org/a", "output": str(tmp_path / "out"), "base": str(base)}
        given = {**options, "device": "cpu", **{key.replace("_", "-"): value for key, value in changes.items()}}
        recipe = given.pop("recipe", None) or make_recipe(steps=2)
        named = [text for key, value in given.items() if value is not None for text in (f"--{key}", value)]
        monkeypatch.setattr(sys, "argv", ["lora-merge", "train", str(recipe), *named, *more])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


def parsed(text: str) -> Any:
    return json.loads(text)


def test_json_is_one_object_on_stdout_and_nothing_else(run: Run, tmp_path: Path) -> None:
    code, out, err = run("--json")
    record = parsed(out)
    assert (code, err) == (0, "")
    assert record["output"] == str(tmp_path / "out")
    assert (record["client_id"], record["num_examples"], record["steps"]) == ("org/a", 8, 2)
    assert set(record["loss"]) == {"first", "last"}
    assert record["tokens"] > 0 < record["seconds"]
    assert record["tokens_per_second"] > 0


def test_quiet_prints_only_the_folder(run: Run, tmp_path: Path) -> None:
    assert run("-q") == (0, f"{tmp_path / 'out'}\n", "")


def test_the_talk_goes_to_stderr_and_the_summary_to_stdout(run: Run, tmp_path: Path) -> None:
    code, out, err = run("--resume")
    assert code == 0
    assert out.startswith(f"{tmp_path / 'out'}: org/a, 8 examples, 2 steps, loss ")
    assert "starting anew" in err


def test_a_folder_that_is_plainly_another_model_is_refused_and_one_that_may_be_it_is_said_to_be_unchecked(
    run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = tmp_path / "cache" / "models--org--tiny"
    snapshot = known / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (known / "refs").mkdir()
    (known / "refs" / "main").write_text("0" * 40)
    config = parsed((base / "config.json").read_text(encoding="utf-8"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    (snapshot / "config.json").write_text(json.dumps({**config, "hidden_size": 576, "dtype": "bfloat16"}))
    code, _, err = run()
    assert code == 2
    assert f"{base} is not org/tiny: its config.json has hidden_size 16 in place of 576." in err
    (snapshot / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    code, _, err = run()
    assert code == 0
    assert f"The weights of org/tiny are taken from {base}, unchecked." in err


def test_off_a_terminal_a_line_now_and_then_says_where_the_run_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_merge.cli.train.SECONDS_BETWEEN_LINES", 0.0)
    _, _, err = run()
    lines = [line for line in err.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == ["step 1 of 2", "step 2 of 2"]
    assert all("tokens a second" in line and line.endswith(" s left") for line in lines)
    assert "org/a: 10 examples, org/tiny on cpu in fp32" in err
    assert "org/a: 2 steps of 4 rows came to 8 of the 10 examples: the adapter states 8" in err
    assert "\x1b" not in err


def test_an_override_is_in_the_statement(run: Run, tmp_path: Path) -> None:
    assert run("--set", "steps=1", "--set", "learning_rate=1e-4")[0] == 0
    stated = parsed((tmp_path / "out" / "lora_merge.json").read_text(encoding="utf-8"))
    assert stated["recipe"]["overrides"] == {"learning_rate": 1e-4, "steps": 1}


@pytest.mark.parametrize(
    ("code", "more", "changes", "told"),
    [
        (2, ["--set", "learning_rat=1"], {}, "did you mean learning_rate"),
        (2, [], {"client_id": "a b"}, "--client-id a b"),
        (2, [], {"device": "tpu"}, "--device must be auto, cpu, cuda, mps or cuda:INDEX, is 'tpu'"),
        (2, ["--frobnicate"], {}, "--frobnicate"),
        (4, [], {"recipe": "labtop"}, "did you mean laptop"),
        (4, [], {"data": "gone.jsonl"}, "gone.jsonl"),
        (4, [], {"base": "gone"}, "--base gone"),
        (5, [], {"base": None}, "not in the local cache"),
    ],
)
def test_each_mistake_has_its_exit_code_and_sentence(
    code: int, more: list[str], changes: dict[str, Any], told: str, run: Run, tmp_path: Path
) -> None:
    found, out, _ = run("--json", *more, **changes)
    error = parsed(out)["error"]
    assert (found, error["code"]) == (code, code)
    assert told in error["message"]
    assert not (tmp_path / "out").exists()


def test_wrong_rows_are_exit_3_and_empty_data_too(run: Run, rows: Path) -> None:
    rows.write_text('{"prompt": "a"}\n{\n', encoding="utf-8")
    code, out, _ = run("--json")
    assert code == 3
    assert [problem["field"] for problem in parsed(out)["error"]["problems"]] == ["line 1", "line 2"]
    rows.write_text("", encoding="utf-8")
    assert run()[0] == 3


def test_a_taken_output_is_exit_2_and_names_force(run: Run) -> None:
    assert run()[0] == 0
    code, _, err = run()
    assert code == 2
    assert "--force" in err
    assert run("--force")[0] == 0


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({"--data": "gone.jsonl"}, 4),
        ({"--data": "README.md"}, 2),
        ({"--base": "gone"}, 4),
        ({"--device": "gpu"}, 2),
        ({"--client-id": "a b"}, 2),
    ],
)
def test_a_hopeless_command_loads_no_torch(changes: dict[str, str], ends: int, rows: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom lora_merge.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)\n"
    )
    (tmp_path / "README.md").touch()
    options = {"--data": str(rows), "--client-id": "org/a", "--output": "out"} | changes
    command = [sys.executable, "-c", code, "train", "laptop", *(text for pair in options.items() for text in pair)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == f"{ends} False\n"


def test_ctrl_c_is_exit_130_says_how_to_go_on_and_resume_does(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_merge.cli import output

    def press(self: output.Output, *_: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return real(self, *_)

    real = output.Output.progress
    monkeypatch.setattr(output.Output, "progress", press)
    code, out, err = run("--set", "steps=4")
    assert (code, out) == (130, "")
    assert "--resume" in err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(output.Output, "progress", real)
    code, out, err = run("--resume", "--set", "steps=4")
    assert code == 0
    assert "Going on from checkpoint-2" in err
    assert "4 steps" in out


def test_a_recipe_of_ones_own_runs_the_script_beside_it(run: Run, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    path = make_recipe(script="mine.py")
    (tmp_path / "mine.py").write_text("def train(loaded, job):\n    raise OSError(28, 'mine ran')\n", encoding="utf-8")
    assert run("--json", recipe=path)[0] == 7
    (tmp_path / "mine.py").write_text("x = 1\n", encoding="utf-8")
    code, out, _ = run("--json", recipe=path)
    assert code == 2
    assert "defines no function train" in parsed(out)["error"]["message"]


def test_the_script_runs_by_itself(base: Path, rows: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    command = [sys.executable, str(folder() / "text.py"), make_recipe(steps=1), "--data", str(rows), "--json"]
    command += ["--client-id", "org/a", "--output", str(tmp_path / "out"), "--base", str(base), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
    assert parsed(done.stdout)["steps"] == 1
    assert done.stderr == ""
