"""`lora-merge recipes`: what it prints, and its exit codes."""

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_merge.cli.main import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("list")`: exit code, stdout and stderr of `lora-merge recipes list`."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora-merge", "recipes", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


def parsed(text: str) -> Any:
    return json.loads(text)


def test_a_file_that_is_no_yaml_is_one_line_that_says_where(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: x\n r: [1\n")
    code, _, err = run("show", str(tmp_path / "bad.yaml"))
    assert code == 2
    assert err.endswith("not a YAML file: mapping values are not allowed here, in line 2, column 3\n")


def test_the_list_fits_eighty_columns(run: Run) -> None:
    assert max(map(len, run("list")[1].splitlines())) <= 80


def test_list_names_every_recipe_with_its_digest(run: Run) -> None:
    code, out, _ = run("list", "--json")
    listed = {entry["name"]: entry["digest"] for entry in parsed(out)["recipes"]}
    assert code == 0
    assert {"laptop", "paper-tinyllama", "paper-gemma-2b", "paper-llama-7b", "paper-llama-13b"} == set(listed)
    assert run("list", "-q")[1].split() == sorted(listed)
    table = run("list")[1]
    assert all(name in table and digest[:12] in table for name, digest in listed.items())


def test_show_prints_the_file_itself_and_its_digest(run: Run) -> None:
    from lora_merge.recipe_files import find, load

    code, out, _ = run("show", "laptop")
    assert code == 0
    assert out == f"{find('laptop').read_text(encoding='utf-8').rstrip()}\n\n# digest {load('laptop').digest}\n"
    assert parsed(run("show", "laptop", "--json")[1])["settings"]["steps"] == 24
    assert run("show", "laptop", "-q")[1] == find("laptop").read_text(encoding="utf-8").rstrip() + "\n"


def test_show_breaks_no_line_of_the_file_on_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    piped = run("show", "laptop")[1]
    monkeypatch.setattr("lora_merge.cli.output.ENDLESS", 40)
    monkeypatch.setenv("COLUMNS", "40")
    assert run("show", "laptop")[1] == piped


def test_copy_makes_the_files_and_refuses_to_overwrite(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("copy", "laptop", str(tmp_path / "ours"))
    assert (code, out.split()) == (0, [str(tmp_path / "ours" / name) for name in ("laptop.yaml", "text.py")])
    code, out, err = run("copy", "laptop", str(tmp_path / "ours"))
    assert (code, out) == (2, "")
    assert "Already there" in err
    assert run("copy", "laptop", str(tmp_path / "ours"), "--force")[0] == 0


def test_a_copy_that_finds_no_room_names_its_place_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        code, out, err = run("copy", "laptop", str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, out) == (7, "")
    assert err.startswith(f"error: {tmp_path / 'laptop.yaml'} could not be written: ")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_recipe_is_exit_4_with_the_nearest_name(run: Run) -> None:
    for command in ("show", "copy"):
        code, out, _ = run(command, "labtop", "--json")
        assert code == 4
        assert "did you mean laptop" in parsed(out)["error"]["message"]
