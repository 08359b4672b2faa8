"""`lora-merge.toml`: defaults below the environment's and the user's, strictly read."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lora_merge.cli.main import app
from tests.cli.running import Run, lora_merge
from tests.cli.test_aggregate import client

__all__ = ["lora_merge"]  # a fixture

RECIPES = ["recipes", "list"]
TRAIN = ["train", "laptop", "--data", "d", "--client-id", "o/a", "-o", "x"]


def run(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments, env=env)
    return result.exit_code, result.output


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_option_wins_over_the_environment_and_that_over_the_file(here: Path) -> None:
    chosen: list[str] = []
    probe = typer.Typer()

    @probe.callback()
    def load(context: typer.Context) -> None:
        from lora_merge.cli.settings_file import load_defaults

        load_defaults(context)

    @probe.command()
    def merge(method: str = "default") -> None:
        chosen.append(method)

    env = {"LORA_MERGE_MERGE_METHOD": "environment"}
    CliRunner().invoke(probe, ["merge"])
    (here / "lora-merge.toml").write_text('[merge]\nmethod = "file"\n')
    CliRunner().invoke(probe, ["merge"])
    CliRunner().invoke(probe, ["merge"], env=env)
    CliRunner().invoke(probe, ["merge", "--method", "option"], env=env)
    assert chosen == ["default", "file", "environment", "option"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('[aggregate]\nmetod = "svd"\n', "did you mean method?"),
        ("[agregate]\n", "did you mean aggregate?"),
        ("aggregate = 3\n", "aggregate"),
        ("[aggregate", "TOML"),
    ],
)
def test_what_the_file_gets_wrong_is_a_usage_error_with_a_suggestion(text: str, named: str, here: Path) -> None:
    (here / "lora-merge.toml").write_text(text)
    code, output = run(*RECIPES)
    assert code == 2
    assert named in output


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("nothing", path)])
def test_what_is_called_so_and_cannot_be_read_is_no_missing_file(make: Callable[[str], None], here: Path) -> None:
    make("lora-merge.toml")
    code, output = run(*RECIPES)
    assert code == 2
    assert "lora-merge.toml is there" in output


def test_the_file_may_begin_with_a_byte_order_mark(here: Path) -> None:
    (here / "lora-merge.toml").write_text("[recipes.list]\nquiet = true\n", encoding="utf-8-sig")
    assert run(*RECIPES)[1].splitlines()[0] == "laptop"


def test_an_option_that_takes_several_values_is_set_by_a_list(here: Path) -> None:
    (here / "lora-merge.toml").write_text('[aggregate]\nexclude = "x"\n')
    code, output = run(*RECIPES)
    assert code == 2
    assert "lora-merge.toml has [aggregate] exclude = 'x', which must be a list." in output
    assert "exclude = ['x']" in output
    (here / "lora-merge.toml").write_text("[aggregate]\nexclude = ['x']\n")
    assert run(*RECIPES)[0] == 0


def test_the_file_may_turn_json_on(here: Path) -> None:
    (here / "lora-merge.toml").write_text("[aggregate]\njson = true\n")
    code, output = run("aggregate", "nowhere", "--output", "global")
    assert code == 4
    assert json.loads(output)["error"]["code"] == 4


@pytest.mark.parametrize("wrong", [("aggregate", "--workers", "0", "x"), ("aggregate", "--bogus"), ("recipes", "show")])
@pytest.mark.parametrize("place", ["file", "environment"])
def test_a_wrong_command_line_is_told_as_json_wherever_that_was_asked_for(
    place: str, wrong: tuple[str, ...], here: Path, lora_merge: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "file":
        (here / "lora-merge.toml").write_text("[aggregate]\njson = true\n[recipes.show]\njson = true\n")
    else:
        monkeypatch.setenv("LORA_MERGE_AGGREGATE_JSON", "1")
        monkeypatch.setenv("LORA_MERGE_RECIPES_SHOW_JSON", "True")
    code, out, err = lora_merge(*wrong)
    assert (code, json.loads(out)["error"]["code"], err) == (2, 2, "")
    monkeypatch.setenv("LORA_MERGE_AGGREGATE_JSON", "0")
    monkeypatch.setenv("LORA_MERGE_RECIPES_SHOW_JSON", "no")
    assert lora_merge(*wrong)[:2] == (2, "")


def test_the_file_sets_a_command_of_a_command_too(here: Path) -> None:
    (here / "lora-merge.toml").write_text("[recipes.list]\nquiet = true\n")
    assert run(*RECIPES)[1].splitlines()[0] == "laptop"
    (here / "lora-merge.toml").write_text("[recipes.lst]\n")
    assert run(*RECIPES)[0] == 2


@pytest.mark.parametrize(
    ("variable", "value", "arguments", "code"),
    [
        ("LORA_MERGE_AGGREGATE_JSON", "true", ("aggregate", "no", "--output", "x"), 4),
        ("LORA_MERGE_RECIPES_LIST_JSON", "1", RECIPES, 0),
        ("LORA_MERGE_TRAIN_SET", "r=0 b=2", (*TRAIN, "--json"), 2),
    ],
)
def test_a_variable_is_called_as_its_option_is(variable: str, value: str, arguments: Sequence[str], code: int) -> None:
    found, output = run(*arguments, env={variable: value})
    assert found == code, output
    assert json.loads(output)["schema_version"] == 1


@pytest.mark.parametrize("variable", ["LORA_MERGE_AGREGATE_METHOD", "LORA_MERGE_AGGREGATE_METOD"])
def test_a_variable_that_sets_nothing_is_an_error_with_a_suggestion(variable: str) -> None:
    code, output = run(*RECIPES, env={variable: "svd"})
    assert code == 2
    assert f"{variable}, which sets no option (did you mean LORA_MERGE_AGGREGATE_METHOD?)." in output


@pytest.mark.parametrize(("name", "value"), [("METHOD", "mean"), ("RANK", "many")])
def test_a_wrong_value_is_traced_to_where_it_was_set(
    name: str, value: str, here: Path, lora_merge: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    client(here / "a")
    options = {"METHOD": "svd", name: value}
    for key, text in options.items():
        monkeypatch.setenv(f"LORA_MERGE_AGGREGATE_{key}", text)
    code, _, err = lora_merge("aggregate", "a", "-o", "global")
    assert code == 2
    assert f"--{name.lower()} is set by LORA_MERGE_AGGREGATE_{name}" in err
    monkeypatch.setenv("LORA_MERGE_AGGREGATE_MAX_WAIT", "long")
    code, _, err = lora_merge("aggregate", "a", "-o", "global")
    assert code == 2
    assert "--max-wait is set by LORA_MERGE_AGGREGATE_MAX_WAIT" in err


@pytest.mark.parametrize(("line", "value"), [('workers = "two"', "'two'"), ("workers = [1, 2]", "[1, 2]")])
def test_a_value_of_a_wrong_kind_is_told_in_a_sentence(line: str, value: str, here: Path, lora_merge: Run) -> None:
    (here / "lora-merge.toml").write_text(f"[aggregate]\n{line}\n")
    code, _, err = lora_merge("aggregate", "a", "-o", "global")
    assert code == 2
    assert err.splitlines()[1] == "hint: --workers is set by lora-merge.toml"
    assert "--workers" in err
    assert value in err
    for words in ("Input", "parse", "unable", "Value error"):
        assert words not in err


def test_what_belongs_to_another_method_does_not_outlive_a_method_that_is_typed(here: Path, lora_merge: Run) -> None:
    client(here / "a")
    (here / "lora-merge.toml").write_text('[aggregate]\nmethod = "svd"\nrank = "1"\nweights = "uniform"\n')
    assert lora_merge("aggregate", "a", "-o", "first", "-q")[0] == 0
    assert json.loads((here / "first" / "aggregation.json").read_text())["ranks"] == [1]
    assert lora_merge("aggregate", "a", "-o", "second", "-q", "--method", "exact", "--weight", "a=2")[0] == 0
    assert json.loads((here / "second" / "aggregation.json").read_text())["ranks"] == [2]
    code, _, err = lora_merge("aggregate", "a", "-o", "third", "--method", "exact", "--rank", "1")
    assert code == 2
    assert "set by" not in err


@pytest.mark.parametrize("command", ["aggregate", "watch"])
def test_what_belongs_to_another_method_does_not_outlive_a_method_of_the_environment(
    command: str, here: Path, lora_merge: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    client(here / "a")
    run = ("aggregate", "a", "-o", "global") if command == "aggregate" else ("watch", "a", "--onto", "global")
    more = () if command == "aggregate" else ("--until", "1")
    (here / "lora-merge.toml").write_text(f'[{command}]\nmethod = "svd"\nrank = 1\n')
    monkeypatch.setenv(f"LORA_MERGE_{command.upper()}_METHOD", "exact")
    code, _, err = lora_merge(*run, *more, "-q")
    assert code == 0, err
    assert json.loads((here / "global" / "aggregation.json").read_text())["ranks"] == [2]
    monkeypatch.setenv(f"LORA_MERGE_{command.upper()}_RANK", "1")  # set as high as the method, it counts
    code, _, err = lora_merge(*run, *more, "-q")
    assert code == 2
    assert f"--rank is set by LORA_MERGE_{command.upper()}_RANK" in err


def test_a_method_that_is_typed_for_a_watch_drops_the_rank_of_the_file(here: Path, lora_merge: Run) -> None:
    client(here / "a")
    (here / "lora-merge.toml").write_text('[watch]\nmethod = "svd"\nrank = 1\n')
    watch = ("watch", "a", "--until", "1", "-q")
    assert lora_merge(*watch, "--onto", "first")[0] == 0
    assert json.loads((here / "first" / "aggregation.json").read_text())["ranks"] == [1]
    assert lora_merge(*watch, "--onto", "second", "--method", "exact")[0] == 0
    assert json.loads((here / "second" / "aggregation.json").read_text())["ranks"] == [2]
    assert lora_merge(*watch, "--onto", "third", "--method", "exact", "--rank", "1")[0] == 2


def test_a_wrong_command_line_names_the_help_of_its_command(lora_merge: Run) -> None:
    assert "hint: lora-merge aggregate --help" in lora_merge("aggregate", "--nope")[2]
    assert "hint: lora-merge recipes show --help" in lora_merge("recipes", "show")[2]


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_reports_in_all_three_ways_and_its_help_is_whole(path: tuple[str, ...], lora_merge: Run) -> None:
    options = {option for parameter in COMMANDS[path].params for option in parameter.opts}
    assert {"--json", "--quiet", "-q", "--debug"} <= options
    assert ("-o" in options) == ("--output" in options)
    several = [each for each in COMMANDS[path].params if getattr(each, "multiple", False)]
    assert [each.name for each in several if not each.help.endswith("may be repeated.")] == []
    code, out, _ = lora_merge(*path, "--help")
    assert code == 0
    assert f"Example: lora-merge {' '.join(path)}" in " ".join(out.split())
    assert "env var" not in out
    assert "<bool>" not in out


def test_a_file_nested_deeper_than_can_be_read_is_exit_2(here: Path, lora_merge: Run) -> None:
    (here / "lora-merge.toml").write_text(f"[aggregate]\nrank = {'[' * 5000}{']' * 5000}\n")
    assert lora_merge("recipes", "list")[::2] == (2, "error: lora-merge.toml is nested too deeply.\n")


@pytest.mark.parametrize("address", ["http://127.0.0.1:99999", "http://[::1", "http://", "huggingface.co", "ftp://x"])
def test_an_address_of_the_hub_that_is_none_is_named(
    address: str, lora_merge: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    code, _, err = lora_merge("inspect", "org/a")
    assert (code, err.split(" must be ")[0]) == (2, "error: HF_ENDPOINT")
