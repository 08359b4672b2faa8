"""`lora-merge.toml`: defaults below the environment's and the user's, strictly read."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lora_merge.cli.main import app

RECIPES = ["recipes", "list"]


def run(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments, env=env)
    return result.exit_code, result.output


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_option_wins_over_the_environment_and_that_over_the_file(here: Path) -> None:
    chosen: list[str] = []
    probe = typer.Typer(context_settings={"auto_envvar_prefix": "LORA_MERGE"})

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
        ('[aggregate]\nmetod = "svd"\n', "'method'"),
        ("[agregate]\n", "'aggregate'"),
        ("aggregate = 3\n", "aggregate"),
        ("[aggregate", "TOML"),
    ],
)
def test_what_the_file_gets_wrong_is_a_usage_error_with_a_suggestion(text: str, named: str, here: Path) -> None:
    (here / "lora-merge.toml").write_text(text)
    code, output = run(*RECIPES)
    assert code == 2
    assert named in output


def test_the_file_may_turn_json_on(here: Path) -> None:
    (here / "lora-merge.toml").write_text("[aggregate]\njson = true\n")
    code, output = run("aggregate", "nowhere", "--output", "global")
    assert code == 4
    assert json.loads(output)["error"]["code"] == 4
