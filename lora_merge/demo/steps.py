"""The demo as a list of commands: what it runs is what a reader can run again."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_merge.demo.areas import Area
from lora_merge.demo.corpus import prompt_of

RECIPE = "laptop"
BATCH_SIZE = 8  # of that recipe
SETTINGS = ("learning_rate=2e-3",)  # few steps, so larger ones
HELD_OUT_ROWS_PER_AREA = 12
QUESTION = prompt_of(
    "def is_palindrome(text):\n"
    "    letters = [char.lower() for char in text if char.isalpha()]\n"
    "    return letters == letters[::-1]"
)


@dataclass(frozen=True)
class Step:
    """One command of the demo.

    Attributes:
        name: what it is called in the demo's lines and log files.
        arguments: of `lora-merge`.
        makes: what is there when it is done, and not before.
        result_is_shown: whether what it prints as its result is passed on, or only written to its log.
        environment: variables that are set for it.
    """

    name: str
    arguments: tuple[str, ...]
    makes: Path
    result_is_shown: bool = True
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def argv(self) -> list[str]:
        return [sys.executable, "-m", "lora_merge", *self.arguments]

    def resumed(self) -> "Step":
        """The step, told to go on from the checkpoint that an interrupted run of it left."""
        left = self.makes.parent / f".{self.makes.name}.training"
        return replace(self, arguments=(*self.arguments, "--resume")) if left.is_dir() else self

    def shown(self) -> str:
        """The command as one would type it."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*variables, *program(), shlex.join(self.arguments)])


@dataclass(frozen=True)
class Plan:
    """Every step of the demo. `model` is None where the base model was given."""

    model: Step | None
    data: Step
    train: tuple[Step, ...]
    aggregate: Step
    evaluate: Step

    def stages(self) -> list[tuple[str, tuple[Step, ...]]]:
        """The steps in order, each needing what the ones before it made, and what they are for."""
        model = [("The model, from the Hub or else from an installed wheel", (self.model,))] if self.model else []
        return [
            *model,
            ("The data: functions of Python's own standard library, an area a client", (self.data,)),
            ("Each client fine-tunes alone, on its own rows, from the same start", self.train),
            ("One merge: the exact mean of the clients' updates", (self.aggregate,)),
            ("Base, locals and global on rows that none of them has seen, from all areas", (self.evaluate,)),
        ]

    def commands(self) -> list[str]:
        return [step.shown() for _, steps in self.stages() for step in steps]


def script(plan: Plan, place: Path) -> str:
    """The commands as a shell script for `place`, that may be run again: each step replaces what it made."""
    lines = ["#!/bin/sh", "# What the demo ran.", "set -e", f"cd {shlex.quote(str(place))}"]
    return "\n".join([*lines, *(f"{command} --force" for command in plan.commands())]) + "\n"


def plan(folder: Path, areas: Sequence[Area], *, steps: int, base: Path | None, threads: int | None) -> Plan:
    """The demo's commands.

    Args:
        folder: where everything goes.
        areas: one a client.
        steps: optimiser steps of each client.
        base: the base model's folder; None makes one inside `folder`.
        threads: of each training process; None leaves it to torch.
    """
    model, data, evaluation = str(base or folder / "base"), folder / "data", folder / "evaluation.json"
    clients = [folder / "clients" / area.name for area in areas]
    here = ("demo", "--output", str(folder), "--clients", str(len(areas)), "--steps", str(steps))
    return Plan(
        model=None if base else Step("model", (*here, "--only", "model"), folder / "base"),
        data=Step("data", (*here, "--only", "data"), data),
        train=tuple(_training(client, data, model, steps, threads) for client in clients),
        aggregate=Step(
            "aggregate", ("aggregate", *map(str, clients), "--output", str(folder / "global")), folder / "global"
        ),
        evaluate=Step(
            "evaluate",
            (
                *("evaluate", *map(str, clients), str(folder / "global"), "--base", model),
                *("--data", str(data / "held-out.jsonl"), "--prompt", QUESTION, "--max-new-tokens", "32"),
                *("--output", str(evaluation)),
            ),
            evaluation,
            result_is_shown=False,
        ),
    )


def _training(client: Path, data: Path, model: str, steps: int, threads: int | None) -> Step:
    settings = [text for setting in (f"steps={steps}", *SETTINGS) for text in ("--set", setting)]
    arguments = (
        *("train", RECIPE, "--data", str(data / f"{client.name}.jsonl"), "--client-id", f"demo/{client.name}"),
        *("--output", str(client), "--base", model, *settings),
    )
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return Step(client.name, arguments, client, environment=environment)


def program() -> list[str]:
    """How `lora-merge` of this Python is called from the shell that the demo was started in."""
    installed = shutil.which("lora-merge")
    if installed and Path(installed).parent == Path(sys.executable).parent:
        return ["lora-merge"]
    return [shlex.quote(sys.executable), "-m", "lora_merge"]
