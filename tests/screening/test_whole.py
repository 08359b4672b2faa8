"""The stop at a large update sees what was trained whole: full tensors, biases, rows of tokens, DoRA's magnitudes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_merge import aggregate
from lora_merge.aggregation.robust import Robust
from lora_merge.errors import MissingBaseError, RefusedError
from lora_merge.folding.onto import fold
from lora_merge.inspection.inspect import inspect
from lora_merge.intake import Reading
from lora_merge.screening.stops import Screening
from tests import models
from tests.adapters import ATTENTION, PLAIN, WEIGHTS, Federation, Kind, clients, edited
from tests.cli.running import Run, lora_merge
from tests.conftest import Federations

__all__ = ["lora_merge"]


def four(name: str, **common: Any) -> Kind:
    return Kind(f"four of {name}", models.llama, clients({}, {}, {}, {}, common={**ATTENTION, **common}))


# What each federation trains besides low-rank factors, and which of its tensors are that.
WHOLE = {
    "modules_to_save": (four("modules_to_save", modules_to_save=["lm_head"]), "lm_head.weight"),
    "biases": (four("biases", bias="lora_only"), ".base_layer.bias"),
    "token rows": (four("token rows", trainable_token_indices=[1, 5, 7]), "trainable_tokens_delta"),
    "DoRA": (four("DoRA", use_dora=True), "lora_magnitude_vector"),
}
each_whole = pytest.mark.parametrize("name", WHOLE)


def boosted(made: Federation, ending: str, to: Path, times: float = 1e4, client: int = 3) -> list[Path]:
    """The clients of `made`, one of which has moved that much farther away from the first in what it trained whole."""
    other = load_file(made.clients[0] / WEIGHTS)

    def boost(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        far = {name: value for name, value in tensors.items() if name.endswith(ending)}
        assert far
        # Outwards, so that a magnitude stays above 0.
        return tensors | {name: value + times * (value - other[name]).abs() for name, value in far.items()}

    folder = edited(made.clients[client], to / made.clients[client].name, tensors=boost)
    return [*made.clients[:client], folder, *made.clients[client + 1 :]]


@each_whole
@pytest.mark.parametrize("with_base", [False, True], ids=["without the base", "with the base"])
def test_a_boosted_one_stops_the_merge_and_nothing_is_written(
    name: str, with_base: bool, federations: Federations, tmp_path: Path, lora_merge: Run
) -> None:
    kind, ending = WHOLE[name]
    made = federations(kind)
    base = ("--base", str(made.base)) if with_base or name == "DoRA" else ()
    run = ("aggregate", "-o", "global", "--certificate", "off", *base)
    assert lora_merge(*run, *map(str, made.clients), "--force")[0] == 0
    folders = [str(folder) for folder in boosted(made, ending, tmp_path)]
    for order in (folders, folders[::-1]):
        code, out, err = lora_merge(*run, *order, "--force")
        assert (code, out) == (3, "")
        assert "org/client-3: update: is more than " in err
        assert err.count("org/client-") == 1
        assert ("far from the base model's" if base else "far from the nearer half of the other clients'") in err
        assert ("--base FOLDER" in err) == (not base)
    assert lora_merge(*run, *folders, "--force", "--exclude", folders[3])[0] == 0
    assert lora_merge(*run, *folders, "--force", "--allow-outliers")[0] == 0
    (line,) = json.loads((tmp_path / "global" / "aggregation.json").read_text())["waved_through"]
    assert line.startswith("org/client-3: update: is more than ")


@each_whole
def test_inspect_says_so_without_the_base(name: str, federations: Federations, tmp_path: Path, lora_merge: Run) -> None:
    kind, ending = WHOLE[name]
    made = federations(kind)
    code, out, _ = lora_merge("inspect", *map(str, made.clients), "--json")
    assert (code, [each["stops"] for each in json.loads(out)["clients"]]) == (0, [[], [], [], []])
    code, out, _ = lora_merge("inspect", *map(str, boosted(made, ending, tmp_path)), "--json")
    assert (code, [len(each["stops"]) for each in json.loads(out)["clients"]]) == (3, [0, 0, 0, 1])


@each_whole
def test_whose_whole_update_is_boosted_is_named_once(name: str, federations: Federations, tmp_path: Path) -> None:
    kind, ending = WHOLE[name]
    made = federations(kind)
    (*rest, bad) = boosted(made, ending, tmp_path)
    both = edited(
        bad, tmp_path / "both" / bad.name, tensors=lambda t: {k: v * 99 if "lora_B" in k else v for k, v in t.items()}
    )
    with pytest.raises(RefusedError) as caught:
        aggregate([*rest, both], tmp_path / "global", base=made.base)
    assert [problem.client for problem in caught.value.problems] == ["org/client-3"]
    assert "has the norm" in caught.value.problems[0].reason


@pytest.mark.parametrize("name", ["modules_to_save", "biases", "token rows"])
def test_what_two_of_three_have_is_measured_from_the_base_only(
    name: str, federations: Federations, tmp_path: Path
) -> None:
    kind, ending = WHOLE[name]
    made = federations(kind)
    plain = federations(PLAIN).clients[0]
    folders = boosted(made, ending, tmp_path)
    with pytest.raises(RefusedError, match="org/client-3: update"):
        aggregate(folders[1:], tmp_path / "global")
    with pytest.raises(RefusedError, match="org/client-3: update"):
        aggregate([plain, *folders[2:]], tmp_path / "global", base=made.base)
    inspected = inspect([plain, *folders[2:]], screening=Screening(), reading=Reading())
    assert not inspected.would_stop
    assert inspected.not_measured


def test_clipping_them_needs_the_base_and_scales_the_whole_update(federations: Federations, tmp_path: Path) -> None:
    kind, ending = WHOLE["modules_to_save"]
    made = federations(kind)
    folders = boosted(made, ending, tmp_path)
    with pytest.raises(MissingBaseError, match=r"lm_head\.weight"):
        aggregate(folders, tmp_path / "global", robust=Robust(clip="3x"))
    ledger = aggregate(folders, tmp_path / "global", robust=Robust(clip="3x"), base=made.base).ledger
    clipped = [each.clipped_to for each in ledger.contributions]
    assert clipped[:3] == [None, None, None]
    assert clipped[3] is not None
    assert clipped[3] < 0.01


def one_by_one(arrivals: list[Path], onto: Path, base: Path) -> None:
    for count in range(1, 5):
        fold(arrivals[:count], onto, base=base, certificate="off")


@each_whole
@pytest.mark.parametrize("place", [0, 1, 3])
def test_whenever_a_boosted_one_comes_folding_stops_where_one_merge_does(
    name: str, place: int, federations: Federations, tmp_path: Path
) -> None:
    kind, ending = WHOLE[name]
    made = federations(kind)
    (*rest, bad) = boosted(made, ending, tmp_path)
    arrivals, onto = [*rest[:place], bad, *rest[place:]], tmp_path / "global"
    with pytest.raises(RefusedError, match=r"org/client-3: update: is more than") as caught:
        one_by_one(arrivals, onto, made.base)
    assert [problem.client for problem in caught.value.problems] == ["org/client-3"]
    assert (place < 2) == ("--withdraw org/client-3" in caught.value.hint)
    assert (place < 2) == ("and is in already" in caught.value.message)
    held = json.loads((onto / "aggregation.json").read_text())["contributions"]
    assert len(held) == max(2, place)
    fold(arrivals, onto, base=made.base, screening=Screening(allow_outliers=True))
    late = edited(rest[0], tmp_path / "client-4")
    assert fold([*arrivals, late], onto, base=made.base).added == ["org/client-4"]  # who was let in is, for good


@each_whole
def test_a_copy_is_one_with_what_it_trained_whole(name: str, federations: Federations, tmp_path: Path) -> None:
    kind, ending = WHOLE[name]
    made = federations(kind)
    other = load_file(made.clients[1] / WEIGHTS)

    def with_own(share: float) -> Any:
        """The first client's tensors, but in what was trained whole that far on the way to the second one's."""
        return lambda tensors: {
            key: value + share * (other[key] - value) if key.endswith(ending) else value
            for key, value in tensors.items()
        }

    honest = edited(made.clients[0], tmp_path / "own", tensors=with_own(1.0))
    copy = edited(made.clients[0], tmp_path / "copy", tensors=with_own(1e-4))
    folders = [*made.clients, honest, copy]
    how: dict[str, Any] = {"base": made.base, "certificate": "off", "weights": "uniform"}
    merged = aggregate(folders, tmp_path / "warned", **how)
    assert [line.split()[0] for line in merged.warnings if "has nearly the update" in line] == ["org/copy"]
    dropped = aggregate(folders, tmp_path / "dropped", screening=Screening(drop_duplicates=True), **how)
    assert [each.source for each in dropped.ledger.left_out] == ["copy"]
    seen = inspect(folders, screening=Screening(), reading=Reading()).clients
    assert [each.client_id for each in seen if "nearly the update" in " ".join(each.flags)] == ["org/copy"]


@each_whole
def test_without_a_low_rank_part_equal_values_are_a_copy_and_others_are_none(
    name: str, federations: Federations, tmp_path: Path
) -> None:
    kind, ending = WHOLE[name]
    made = federations(kind)
    other = load_file(made.clients[1] / WEIGHTS)

    def still(taken: str) -> Any:
        """The first client's tensors with lora_B at zero, and the second one's where a name ends in `taken`."""
        return lambda tensors: {
            key: torch.zeros_like(value) if ".lora_B." in key else (other if key.endswith(taken) else tensors)[key]
            for key, value in tensors.items()
        }

    taken = {"a": "none", "b": "lora_A.weight", "other": ending}
    folders = [edited(made.clients[0], tmp_path / name, tensors=still(what)) for name, what in taken.items()]
    merged = aggregate(
        [*made.clients[2:], *folders],
        tmp_path / "global",
        base=made.base,
        weights="uniform",
        certificate="off",
        screening=Screening(drop_duplicates=True),
    )
    assert [each.source for each in merged.ledger.left_out] == ["b"]
