"""A sample of `tests/benchmarks/attacks.py` on the smallest model that trains: what stops, what a robust rule keeps.

Five clients, trained for a few steps each; the figures of a model that means something are the benchmark's.
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lora_merge import aggregate
from lora_merge.adapter import Factors
from lora_merge.aggregation.robust import Robust
from lora_merge.checkpoint.peft_folder import open_folder
from lora_merge.errors import RefusedError
from lora_merge.screening.stops import Screening
from tests.benchmarks.small_federation import QUICK, fine_tune, hand_in, pretrained, text_of

CLIENTS, HOSTILE = 5, 2  # how many, and which of them hands in something else
RULES = {
    "clip": Robust(clip="3x"),
    "geometric median": Robust(rule="geometric-median"),
    "krum": Robust(rule="krum", byzantine=1),
    "multi-krum": Robust(rule="multi-krum", byzantine=1),
    "median": Robust(rule="median"),
    "trimmed mean": Robust(rule="trimmed-mean", trim=0.25),
}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five clients with a package of code each, from one start of lora_A."""
    root, text = tmp_path_factory.mktemp("attacks"), text_of(QUICK)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # transformers, to PEFT
        base = pretrained(text, QUICK, root / "base")
        return [fine_tune(base, text.train[i], 1, f"client-{i}", root / f"client-{i}") for i in range(CLIENTS)]


def attacked(honest: Sequence[Path], to: Path, times: float) -> list[Path]:
    """The five, of which one hands in its update times a factor."""
    bad = hand_in(honest[HOSTILE], to / "bad", f"client-{HOSTILE}", 60, times=times, turned=False)
    return [*honest[:HOSTILE], bad, *honest[HOSTILE + 1 :]]


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """s B A of each module, fp64."""
    adapter = open_folder(folder)
    found = {}
    for name in adapter.specs:
        update = adapter[name]
        assert isinstance(update, Factors)
        found[name] = update.scaling * (update.B.double() @ update.A.double())
    adapter.close()
    return found


def apart(one: Path, two: Path) -> float:
    """|one - two| over |two|."""
    a, b = deltas(one), deltas(two)
    difference, size = (math.hypot(*(float(x.norm()) for x in each)) for each in ([a[n] - b[n] for n in b], b.values()))
    return difference / size


def test_honest_clients_merge(honest: list[Path], tmp_path: Path) -> None:
    assert not any("nearly" in line for line in aggregate(honest, tmp_path / "global").warnings)


@pytest.mark.parametrize("times", [10, 100, -5.5, float("nan")])
def test_a_boosted_a_flipped_and_a_broken_update_stop_the_merge(
    times: float, honest: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(RefusedError) as caught:
        aggregate(attacked(honest, tmp_path, times), tmp_path / "global")
    assert {problem.client for problem in caught.value.problems} == {f"org/client-{HOSTILE}"}
    assert not (tmp_path / "global").exists()


def test_a_copy_however_it_is_factored_is_named_and_left_out_on_request(honest: list[Path], tmp_path: Path) -> None:
    copies = [
        hand_in(honest[HOSTILE], tmp_path / name, name, 60, times=1, turned=name == "turned")
        for name in ("same", "turned")
    ]
    said = aggregate([*honest, *copies], tmp_path / "global").warnings
    for name in ("same", "turned"):
        assert any(line.startswith(f"org/{name} has ") and f"org/client-{HOSTILE}" in line for line in said)
    screening = Screening(drop_duplicates=True)
    left = aggregate([*honest, *copies], tmp_path / "without", screening=screening).ledger.left_out
    assert [each.source for each in left] == ["same", "turned"]


@pytest.mark.parametrize("times", [10, 100, -5.5])
@pytest.mark.parametrize("rule", RULES)
def test_a_robust_rule_stays_nearer_to_the_honest_mean_than_the_plain_mean(
    rule: str, times: float, honest: list[Path], tmp_path: Path
) -> None:
    rest = [folder for place, folder in enumerate(honest) if place != HOSTILE]
    clients = attacked(honest, tmp_path, times)
    mean = aggregate(rest, tmp_path / "honest").output
    plain = aggregate(clients, tmp_path / "plain", screening=Screening(allow_outliers=True)).output
    robust = aggregate(clients, tmp_path / "robust", robust=RULES[rule]).output
    assert apart(robust, mean) < 0.7 * apart(plain, mean)
