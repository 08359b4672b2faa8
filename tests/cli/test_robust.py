"""The robust options of `lora-merge aggregate`: exit codes, what is shown, and `--json`."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.adapters import edited
from tests.cli.running import Run, lora_merge
from tests.cli.test_aggregate import client

__all__ = ["lora_merge"]


@pytest.fixture
def five(tmp_path: Path) -> Sequence[str]:
    """Five clients, the last of which is boosted a thousandfold."""
    for number in range(4):
        client(tmp_path / f"client-{number}", seed=number)
    edited(tmp_path / "client-0", tmp_path / "client-4", tensors=lambda t: {k: v * 32 for k, v in t.items()})
    return [f"client-{number}" for number in range(5)]


def test_clipping_is_shown_and_recorded(lora_merge: Run, five: Sequence[str]) -> None:
    code, _, err = lora_merge("aggregate", *five, "-o", "global")
    assert code == 3
    assert "--clip 3x" in err
    code, out, _ = lora_merge("aggregate", *five, "-o", "global", "--clip", "3x")
    assert code == 0
    shown = dict(line.split("  ", 1) for line in out.splitlines())
    assert "org/client-4 (to " in shown["clipped"]
    assert shown["aimed at"].strip() == "the weighted mean of the clipped updates of the clients"
    assert "% of its norm away" in shown["from the mean"]


def test_the_record_holds_what_a_rule_did(lora_merge: Run, five: Sequence[str]) -> None:
    code, out, _ = lora_merge("aggregate", *five, "-o", "global", "--robust", "krum", "--byzantine", "1", "--json")
    assert code == 0
    record = json.loads(out)
    assert record["options"] == {"seed": 0, "robust": "krum", "byzantine": 1}
    assert sorted(each["merged_share"] for each in record["contributions"]) == [0, 0, 0, 0, 1]
    assert record["contributions"][4]["merged_share"] == 0
    assert record["from_mean"]["relative_error"] > 0.9
    assert record["certificate"]["whole"]["relative_error"] < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        ("--robust", "geometric-median"),
        ("--robust", "multi-krum", "--byzantine", "1", "--clip", "2x"),
        ("--robust", "median"),
        ("--robust", "trimmed-mean", "--trim", "0.25", "--method", "svd", "--rank", "2"),
    ],
)
def test_a_rule_is_made_again_by_verify(lora_merge: Run, five: Sequence[str], options: Sequence[str]) -> None:
    assert lora_merge("aggregate", *five, "-o", "global", *options)[0] == 0
    code, out, _ = lora_merge("verify", "global", *five)
    assert code == 0
    assert "identical" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--robust", "mode"], "--robust must be one of geometric-median, krum"),
        (["--robust", "krum"], "needs --byzantine F"),
        (["--robust", "krum", "--byzantine", "2"], "among 7 or more; here are 5"),
        (["--robust", "median", "--byzantine", "1"], "--byzantine is of"),
        (["--trim", "0.1"], "--trim is of"),
        (["--robust", "trimmed-mean", "--trim", "0.5"], "below 0.5"),
        (["--clip", "3y"], "--clip must be"),
        (["--clip", "0"], "--clip must be"),
        (["--robust", "median", "--method", "fedavg"], "a mean of its own"),
        (["--robust", "trimmed-mean", "--method", "dare"], "a mean of its own"),
        (["--clip", "3x", "--method", "ties"], "divides by the weight"),
        (["--density", "0.5"], "--density is of"),
        (["--method", "ties", "--density", "0"], "--density must be"),
        (["--seed", "-1"], "--seed must be"),
        (["--method", "exact", "--rank", "3"], "--rank is of"),
    ],
)
def test_what_makes_no_sense_is_exit_2_in_a_sentence(
    lora_merge: Run, five: Sequence[str], options: Sequence[str], said: str, tmp_path: Path
) -> None:
    code, out, err = lora_merge("aggregate", *five, "-o", "global", "--allow-outliers", *options)
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())
    assert not (tmp_path / "global").exists()


@pytest.mark.parametrize(
    "options",
    [["--clip", "3x"], ["--robust", "median"], ["--byzantine", "1"], ["--trim", "0.1"], ["--density", "0.5"]],
)
def test_no_rule_goes_with_onto(lora_merge: Run, five: Sequence[str], options: Sequence[str]) -> None:
    assert lora_merge("aggregate", *five[:2], "-o", "global")[0] == 0
    code, _, err = lora_merge("aggregate", five[2], "--onto", "global", *options)
    assert code == 2
    assert f"{options[0]} does not go with --onto" in err


@pytest.mark.parametrize("options", [["--clip", "1x"], ["--robust", "median"], ["--method", "ties"]])
def test_nothing_folds_onto_what_a_rule_made(lora_merge: Run, five: Sequence[str], options: Sequence[str]) -> None:
    assert lora_merge("aggregate", *five[:2], "-o", "global", *options)[0] == 0
    code, _, err = lora_merge("aggregate", five[2], "--onto", "global")
    assert code == 2
    assert "needs all clients at once" in err
