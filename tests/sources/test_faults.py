"""Samples of what `tests.sources.matrix` and `tests.sources.flips` run in full; and disks that fill."""

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.matrix import Case
from tests.hub.server import LocalHub
from tests.sources.crash import sample
from tests.sources.federation import Puller, publish
from tests.sources.flips import flip
from tests.sources.matrix import SURVIVED_ONCE, Bench, cases

QUICK = [case for case in cases() if case.fault != "stall" and (case.times or case.fault not in SURVIVED_ONCE)]


@pytest.fixture
def made(hub: LocalHub, pullers: dict[bool, Puller], tmp_path: Path) -> Bench:
    """Two clients on the Hub, and both ways to pull them."""
    found = Bench(hub, {xet: Puller(puller.client, puller.home, tmp_path) for xet, puller in pullers.items()})
    found.prepare()
    return found


def test_every_fault_ends_in_the_right_bytes_or_in_a_sentence(made: Bench) -> None:
    asked: list[Case] = random.Random(1).sample(QUICK, 25)
    assert len({made.run(case) for case in asked}) > 2


def test_every_flipped_bit_is_noticed(made: Bench) -> None:
    made.expect(made.pullers[False])
    draw = random.Random(2)
    for _ in range(12):
        flip(made, draw)


def test_a_kill_at_any_step_is_made_good_by_the_same_command(made: Bench) -> None:
    assert sample(made, 6, seed=3) >= 3


@pytest.fixture
def small_disk(pullers: dict[bool, Puller]) -> Iterator[Path]:
    """A file system of 256 KiB in the place of the cache."""
    place = pullers[False].home / "hub"
    pullers[False].forget()
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("width", [5_000, 16_200, 20_000])
def test_a_disk_that_fills_is_exit_7_in_a_sentence(
    hub: LocalHub, pullers: dict[bool, Puller], small_disk: Path, tmp_path: Path, width: int
) -> None:
    publish(hub, 1, width=width)  # 16 bytes for each; 16_200 fit but for the cache's own files
    pull = Puller(pullers[False].client, pullers[False].home, tmp_path)
    ran = pull("org/client-0", "-o", "global")
    assert (ran.code, ran.out if ran.code else "") == (0 if width == 5_000 else 7, ""), ran.err
    if ran.code:
        assert len(ran.err.splitlines()) == 1
        assert ("No space left on device" if width == 16_200 else "bytes free") in ran.err
        assert not list(small_disk.glob("models--*/blobs/*.incomplete"))
