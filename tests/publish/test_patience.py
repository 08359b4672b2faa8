"""`--max-wait` bounds what a whole command waits for a busy Hub, however many sessions with it the command opens."""

import re
from pathlib import Path

import pytest

from tests.hub.server import LocalHub
from tests.publish.conftest import Run, client_folder
from tests.publish.test_onto import clients
from tests.publish.test_push import push
from tests.training.conftest import MakeRecipe, make_recipe, rows

__all__ = ["clients", "make_recipe", "push", "rows"]  # fixtures

# One wait of a second in each of the sessions that a command opens: may it publish, what does it read, the push.
ASKED = ("GET /api/whoami-v2", "GET /api/models", "POST /api/models/org/global/commit/*")


def busy(hub: LocalHub, *requests: str) -> None:
    """Each request is asked to wait for a second, once."""
    for request in requests:
        hub.fault(request, "status", status=429, retry_after=1)


def waits(err: str) -> int:
    return len(re.findall(r"trying again in 1 s\.", err))


@pytest.mark.usefixtures("clients")
def test_a_merge_and_its_push_wait_no_longer_together_than_was_said(run: Run, hub: LocalHub, tmp_path: Path) -> None:
    merge = ("aggregate", "org/client-*", "-o", "global", "--push", "org/global")
    busy(hub, *ASKED)
    code, _, err = run(*merge, "--max-wait", "2.5")
    assert (code, waits(err)) == (5, 2), err
    assert "To publish it: lora-merge push global org/global" in err
    assert (tmp_path / "global" / "adapter_model.safetensors").exists()
    hub.clear_faults()
    busy(hub, *ASKED)
    code, _, err = run(*merge, "--force", "--max-wait", "30")
    assert (code, waits(err)) == (0, 3), err


@pytest.mark.usefixtures("clients")
def test_a_fold_onto_a_repository_too(run: Run, hub: LocalHub) -> None:
    hub.create("org/global", private=True)
    asked = ("GET /api/models/org/global/revision/main", ASKED[1], ASKED[0])
    busy(hub, *asked)
    code, _, err = run("aggregate", "org/client-*", "--onto", "org/global", "--max-wait", "2.5")
    assert (code, waits(err)) == (5, 2), err
    hub.clear_faults()
    busy(hub, *asked)
    code, _, err = run("aggregate", "org/client-*", "--onto", "org/global", "--max-wait", "30")
    assert (code, waits(err)) == (0, 3), err


def test_training_waits_for_its_base_model_no_longer_than_was_said(
    run: Run, hub: LocalHub, make_recipe: MakeRecipe, rows: Path
) -> None:
    hub.create("org/tiny", {"config.json": "{}"})
    hub.fault("GET /api/models/org/tiny*", "status", status=429, retry_after=5, times=None)
    given = ("--data", str(rows), "--client-id", "org/a", "--output", "out", "--device", "cpu")
    code, _, err = run("train", make_recipe(steps=1), *given, "--max-wait", "2")
    assert code == 5
    assert "error: 127.0.0.1 answers 429 and asks to wait 5 s; gave up after 0 s." in err


def test_so_does_an_export(run: Run, hub: LocalHub, tmp_path: Path) -> None:
    client_folder(tmp_path / "client-a", base="org/tiny")
    hub.fault("GET /api/models/org/tiny*", "status", status=429, retry_after=5, times=None)
    code, _, err = run("export", "client-a", "--base", "org/tiny", "-o", "merged", "--max-wait", "2")
    assert code == 5
    assert "asks to wait 5 s; gave up after 0 s." in err
