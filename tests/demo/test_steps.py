"""The demo is a list of commands: what is shown is what runs, in an order in which each finds what it needs."""

import shlex
import sys
from pathlib import Path

import pytest

from lora_merge.demo import steps as steps_module
from lora_merge.demo.areas import AREAS
from lora_merge.demo.steps import BATCH_SIZE, RECIPE, SETTINGS, Plan, plan
from lora_merge.recipe_files import load


def plan_in(folder: Path, base: Path | None = None) -> Plan:
    return plan(folder, AREAS[:2], steps=3, base=base, threads=1)


def test_what_is_shown_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "program", lambda: ["lora-merge"])
    made = plan_in(Path("my demo"))
    for (_, steps), command in zip(made.stages(), made.commands(), strict=False):
        assert shlex.split(steps[0].shown())[-len(steps[0].arguments) :] == list(steps[0].arguments)
        assert command in [step.shown() for _, some in made.stages() for step in some]
    assert made.train[0].shown().startswith("OMP_NUM_THREADS=1 lora-merge train laptop --data 'my demo/data/")
    assert made.train[0].argv[:3] == [sys.executable, "-m", "lora_merge"]


def test_every_client_has_its_own_rows_and_all_start_from_the_same_base_and_recipe() -> None:
    made = plan_in(Path("d"))
    assert [step.makes for step in made.train] == [Path("d/clients/networking"), Path("d/clients/text")]
    shared = {step.arguments[step.arguments.index("--base") :] for step in made.train}
    assert shared == {("--base", "d/base", "--set", "steps=3", "--set", SETTINGS[0])}
    assert {step.arguments[3] for step in made.train} == {"d/data/networking.jsonl", "d/data/text.jsonl"}


def test_a_given_base_is_used_everywhere_and_none_is_made() -> None:
    made = plan_in(Path("d"), base=Path("mine"))
    assert made.model is None
    for step in (*made.train, made.evaluate):
        assert step.arguments[step.arguments.index("--base") + 1] == "mine"


def test_the_merge_and_the_judgement_are_of_all_clients() -> None:
    made = plan_in(Path("d"))
    clients = ("d/clients/networking", "d/clients/text")
    assert made.aggregate.arguments == ("aggregate", *clients, "--output", "d/global")
    assert made.evaluate.arguments[1:4] == (*clients, "d/global")
    assert [len(steps) for _, steps in made.stages()] == [1, 1, 2, 1, 1]


def test_an_interrupted_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    step = plan_in(tmp_path).train[0]
    assert step.resumed() == step
    (tmp_path / "clients" / ".networking.training").mkdir(parents=True)
    assert step.resumed().arguments == (*step.arguments, "--resume")


def test_the_recipe_has_the_settings_that_the_demo_counts_on() -> None:
    recipe = load(RECIPE, [*SETTINGS, "steps=9"]).recipe
    assert (recipe.batch_size, recipe.prompt_form, recipe.steps) == (BATCH_SIZE, "plain", 9)


def test_a_program_that_is_not_on_the_path_is_shown_as_it_can_be_called(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert steps_module.program() == [shlex.quote(sys.executable), "-m", "lora_merge"]
    script = tmp_path / "lora-merge"
    script.touch(mode=0o755)
    assert steps_module.program() == [shlex.quote(sys.executable), "-m", "lora_merge"]  # another Python's
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert steps_module.program() == ["lora-merge"]
