"""Samples of the full runs: faults at every request of a push, kills around each, publishers at once."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.client import Client
from tests.hub.kills import can_trace
from tests.hub.server import LocalHub
from tests.publish import concurrent, crash, matrix
from tests.publish.conftest import client_folder
from tests.sources.federation import impatient

QUICK = {"503", "500", "404", "reset", "lost", "HTML", "truncate", "429, wait an hour"}


@pytest.fixture(scope="module")
def bench(running_hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[matrix.Bench]:
    folder = tmp_path_factory.mktemp("matrix")
    homes = {xet: impatient(running_hub.env(cache=folder / f"home-{xet}", xet=xet)) for xet in (True, False)}
    with Client(homes[True]) as with_xet, Client(homes[False]) as without:
        yield matrix.Bench(running_hub, {True: with_xet, False: without}, client_folder(folder / "adapter"))


@pytest.fixture(scope="module")
def forkers(running_hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, Client]]:
    """With Xet and without."""
    homes = {xet: running_hub.env(cache=tmp_path_factory.mktemp("forker"), xet=xet) for xet in (True, False)}
    with Client(homes[True]) as with_xet, Client(homes[False]) as without:
        yield {True: with_xet, False: without}


def test_a_sample_of_faults_ends_published_or_in_a_documented_code(bench: matrix.Bench) -> None:
    quick = [case for case in matrix.cases() if case.fault in QUICK and case.times]
    for case in random.Random(20).sample(quick, 16):
        bench.run(case)


def test_a_sample_of_kills_leaves_nothing_half_done_or_done_twice(
    forkers: dict[bool, Client], hub: LocalHub, tmp_path: Path
) -> None:
    made = crash.Bench(hub, forkers, client_folder(tmp_path / "adapter"))
    chosen = random.Random(20).sample(list(crash.cases(made)), 6)
    if can_trace():
        chosen += [crash.Case(3, "send", False, False), crash.Case(2, "write", False, False)]
    for case in chosen:
        made.run(case)


def test_publishers_at_once_are_each_published_once_or_told_of_a_conflict(
    forkers: dict[bool, Client], hub: LocalHub, tmp_path: Path
) -> None:
    folders = concurrent.adapters(tmp_path, 4)
    for _ in range(2):
        hub.reset()
        assert concurrent.one_round(hub, forkers[True], folders, tmp_path / "pids").total() == 4
