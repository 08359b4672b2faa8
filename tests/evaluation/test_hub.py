"""`evaluate` and `export` on repositories of the Hub: pinned, hashed, called by their ids."""

import json
from pathlib import Path

import pytest

from tests.evaluation.conftest import adapters, held_out
from tests.hub.server import LocalHub
from tests.publish.conftest import Run, hub, publisher, run, running_hub
from tests.training.conftest import base

__all__ = ["adapters", "base", "held_out", "hub", "publisher", "run", "running_hub"]  # fixtures


@pytest.fixture
def published(hub: LocalHub, adapters: tuple[Path, ...]) -> None:
    """The two clients and their merge, in repositories; and the base."""
    for folder in adapters:
        hub.create(f"org/{folder.name}", {path.name: path.read_bytes() for path in folder.iterdir()})


@pytest.mark.usefixtures("published")
def test_repositories_and_patterns_are_measured_as_folders_are(
    hub: LocalHub, run: Run, base: Path, adapters: tuple[Path, ...], held_out: Path
) -> None:
    given = ("--base", str(base), "--data", str(held_out), "--device", "cpu", "--json")
    code, out, err = run("evaluate", "org/*th", "hf://org/global@main", *given)
    assert code == 0, err
    _, folders, _ = run("evaluate", *map(str, adapters), *given)
    assert json.loads(out)["models"] == [
        {**model, "name": "org/global" if model["name"] == "global" else model["name"]}
        for model in json.loads(folders)["models"]
    ]
    commits = {hub.head(f"org/{folder.name}") for folder in adapters}
    assert {call.path.split("/")[4] for call in hub.calls("* /org/*/resolve/*")} == commits


@pytest.mark.usefixtures("published")
def test_a_base_and_a_global_of_the_hub_are_exported(hub: LocalHub, run: Run, base: Path, tmp_path: Path) -> None:
    hub.create("org/base", {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()})
    code, _, err = run("export", "org/global", "--base", "org/base", "--output", "merged")
    assert code == 0, err
    assert f"Base model org/base at {hub.head('org/base')}" in err
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_the_hub_is_asked_for_the_base_once(
    hub: LocalHub, run: Run, base: Path, adapters: tuple[Path, ...], held_out: Path
) -> None:
    hub.create("org/base", {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()})
    given = ("--base", "org/base", "--data", str(held_out), "--device", "cpu", "--json")
    code, out, err = run("evaluate", str(adapters[0]), *given)
    assert code == 0, err
    _, folders, _ = run("evaluate", str(adapters[0]), *given, "--base", str(base))
    assert json.loads(out)["models"] == json.loads(folders)["models"]
    assert len(hub.calls("GET /api/models/org/base*")) == 1


def test_a_repository_that_is_not_there_is_said(run: Run, base: Path, held_out: Path) -> None:
    code, _, err = run("evaluate", "org/none", "--base", str(base), "--data", str(held_out))
    assert code == 4
    assert "There is no org/none on the Hub" in err
