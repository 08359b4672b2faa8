"""The stops at late arrivals: held against those that are in, before anything is changed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_merge import aggregate
from lora_merge.errors import NotFoundError, RefusedError, UsageError
from lora_merge.folding.onto import fold, plan
from lora_merge.screening.stops import Screening
from lora_merge.screening.weighing import cap_in, capped_by
from lora_merge.verify import verify
from lora_merge.watching.events import Arrival, Event, Refusal
from lora_merge.watching.watch import watch
from tests.cli.running import Run, lora_merge
from tests.cli.test_aggregate import LORA_A, client, poison
from tests.cli.test_screening import boosted, changed, rotated
from tests.conftest import digests

__all__ = ["lora_merge"]

SAME = ("adapter_model.safetensors", "adapter_config.json", "lora-merge.lock")


@pytest.fixture
def four(tmp_path: Path) -> list[Path]:
    """Four clients of 100 examples, a to d, of a module that holds them all."""
    return [client(tmp_path / name, seed=seed, num_examples=100, width=32) for seed, name in enumerate("abcd")]


@pytest.fixture
def onto(four: list[Path], tmp_path: Path) -> Path:
    """A global adapter of the four."""
    return fold(four, tmp_path / "global").output


def late(folder: Path, **stated: Any) -> Path:
    """A client that comes late, of 100 examples."""
    return client(folder, **{"seed": 9, "num_examples": 100, "width": 32, **stated})


def ledger(onto: Path) -> Any:
    return json.loads((onto / "aggregation.json").read_text())


def members(onto: Path) -> list[str]:
    return [each["client_id"].removeprefix("org/") for each in ledger(onto)["contributions"]]


def require_one_merge(onto: Path, folders: list[Path], **options: Any) -> None:
    one = aggregate(folders, onto.parent / "one", **options).output
    assert {name: digests(onto)[name] for name in SAME} == {name: digests(one)[name] for name in SAME}


def test_a_boosted_late_arrival_stops_and_nothing_is_changed(onto: Path, four: list[Path], tmp_path: Path) -> None:
    arrival, before = changed(late(tmp_path / "e"), boosted), digests(onto)
    with pytest.raises(RefusedError, match="org/e: update: has the norm") as caught:
        fold([arrival], onto)
    assert all(way in caught.value.hint for way in ("--exclude", "--allow-outliers", "--clip"))
    assert digests(onto) == before
    fold([arrival], onto, screening=Screening(allow_outliers=True))
    assert "org/e: update: has the norm" in ledger(onto)["waved_through"][0]
    require_one_merge(onto, [*four, arrival], screening=Screening(allow_outliers=True))
    fold([], onto, withdraw=["org/a"])
    assert len(ledger(onto)["waved_through"]) == 1
    fold([], onto, withdraw=["org/e"])
    assert ledger(onto)["waved_through"] == []


def hostile(folder: Path, kind: str) -> Path:
    """A client that one merge stops at: of very many examples, or of a very large update."""
    return late(folder, num_examples=10**18) if kind == "num_examples" else changed(late(folder), boosted)


def one_by_one(folders: list[Path], onto: Path) -> None:
    for folder in folders:
        fold([folder], onto)


@pytest.mark.parametrize("kind", ["num_examples", "update"])
@pytest.mark.parametrize("place", range(5))
def test_whenever_a_hostile_client_comes_folding_stops_where_one_merge_does(
    four: list[Path], tmp_path: Path, kind: str, place: int
) -> None:
    arrivals = [*four[:place], hostile(tmp_path / "h", kind), *four[place:]]
    with pytest.raises(RefusedError, match=f"org/h: {kind}"):
        aggregate(arrivals, tmp_path / "one")
    with pytest.raises(RefusedError, match=f"org/h: {kind}") as caught:
        one_by_one(arrivals, tmp_path / "global")
    assert [problem.client for problem in caught.value.problems] == ["org/h"]
    is_in = "org/h" in (each["client_id"] for each in ledger(tmp_path / "global")["contributions"])
    assert is_in == ("--withdraw org/h" in caught.value.hint)
    assert is_in == (", and is in already" in caught.value.message)


@pytest.mark.parametrize("kind", ["num_examples", "update"])
def test_the_ways_past_a_hostile_client_that_is_in_lead_on(four: list[Path], tmp_path: Path, kind: str) -> None:
    onto, bad = tmp_path / "global", hostile(tmp_path / "h", kind)
    fold([bad], onto)
    before = digests(onto)
    with pytest.raises(RefusedError, match="is in already"):
        fold(four, onto)
    assert digests(onto) == before
    fold(four, onto, output=tmp_path / "without", withdraw=["org/h"])
    require_one_merge(tmp_path / "without", four)
    fold(four, onto, screening=Screening(allow_dominant=kind == "num_examples", allow_outliers=kind == "update"))
    assert len(ledger(onto)["waved_through"]) == 1
    assert fold([late(tmp_path / "f", seed=7)], onto).added == ["org/f"]  # who was let in knowingly is, for good
    assert len(ledger(onto)["waved_through"]) == 1
    other = hostile(tmp_path / "g", "update" if kind == "num_examples" else "num_examples")
    with pytest.raises(RefusedError, match="org/g"):
        fold([other], onto)


def test_to_be_let_past_one_stop_is_not_to_be_let_past_the_other(four: list[Path], tmp_path: Path) -> None:
    onto, bad = tmp_path / "global", changed(late(tmp_path / "h", num_examples=10**18), boosted)
    fold([*four[:2], bad], onto, screening=Screening(allow_outliers=True))
    assert "update" in ledger(onto)["waved_through"][0]
    with pytest.raises(RefusedError, match="org/h: num_examples"):
        fold([four[2]], onto)


def test_of_a_mean_those_who_are_in_are_judged_too(four: list[Path], tmp_path: Path) -> None:
    onto = fold([changed(late(tmp_path / "h"), boosted)], tmp_path / "svd", method="svd", rank=4).output
    with pytest.raises(RefusedError, match=r"org/h: update: .* and is in already"):
        fold(four, onto)


def test_the_norm_of_each_arrival_is_kept(four: list[Path], tmp_path: Path) -> None:
    onto = tmp_path / "global"
    for folder in four:
        fold([folder], onto)
    norms = {each["client_id"]: each["norm"] for each in ledger(onto)["contributions"]}
    for folder in four:
        tensors = load_file(folder / "adapter_model.safetensors")
        delta = tensors[LORA_A.replace("_A", "_B")] @ tensors[LORA_A]
        assert norms[f"org/{folder.name}"] == pytest.approx(float(delta.norm()), rel=1e-5)
    require_one_merge(onto, four)


def test_a_dominant_late_count_stops_and_its_ways_on_lead_on(onto: Path, four: list[Path], tmp_path: Path) -> None:
    arrival, before = late(tmp_path / "e", num_examples=10**6), digests(onto)
    with pytest.raises(RefusedError, match="org/e: num_examples") as caught:
        fold([arrival], onto)
    assert all(way in caught.value.hint for way in ("--allow-dominant", "--exclude", "--cap-examples"))
    assert digests(onto) == before
    fold([arrival], onto, screening=Screening(allow_dominant=True))
    require_one_merge(onto, [*four, arrival], screening=Screening(allow_dominant=True))
    assert "(--allow-dominant)" in ledger(onto)["waved_through"][0]


def test_a_cap_is_folded_on(four: list[Path], tmp_path: Path) -> None:
    onto, arrival = tmp_path / "global", late(tmp_path / "e", num_examples=1000)
    capped = Screening(cap_examples="2.5x")
    fold(four, onto, screening=capped)
    for given in (None, 250, "250"):
        fold([arrival], onto, screening=Screening(cap_examples=given))
        assert ledger(onto)["weighting"] == "examples, at most 250 each"
        assert [each["weight"] for each in ledger(onto)["contributions"]] == [100.0] * 4 + [250.0]
        require_one_merge(onto, [*four, arrival], screening=capped, force=True)
        fold([], onto, withdraw=["org/e"])
    with pytest.raises(UsageError, match="made with 250"):
        fold([arrival], onto, screening=Screening(cap_examples=300))
    assert verify(onto, four).verdict == "identical"


def test_a_cap_that_the_global_adapter_was_not_made_with_is_refused(onto: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="made without one"):
        fold([late(tmp_path / "e")], onto, screening=Screening(cap_examples="5x"))


@pytest.mark.parametrize("options", [{"screening": Screening(cap_examples=20)}, {"weights": "uniform"}])
def test_settings_that_differ_are_refused_where_nothing_is_new_too(
    onto: Path, four: list[Path], options: dict[str, Any]
) -> None:
    for sources in (four, []):
        with pytest.raises(UsageError, match=r"made without one|weighted by examples"):
            fold(sources, onto, **options)
        with pytest.raises(UsageError, match=r"made without one|weighted by examples"):
            plan(sources, onto, **options)


def test_whoever_states_no_examples_is_told_what_helps_here(onto: Path, four: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="states no num_examples") as caught:
        fold([late(tmp_path / "silent", num_examples=None)], onto)
    assert "uniform" not in caught.value.hint


def test_a_merged_adapter_is_folded_into_none(onto: Path, four: list[Path], tmp_path: Path, lora_merge: Run) -> None:
    merged, before = aggregate(four[:1], tmp_path / "merged").output, members(onto)
    for judged in (fold, plan):
        with pytest.raises(RefusedError, match=r"aggregation\.json: is that of a merged adapter"):
            judged([merged], onto)
    e = late(tmp_path / "e")
    assert fold([f"{tmp_path}/[e-m]*"], onto).added == [json.loads((e / "lora_merge.json").read_text())["client_id"]]
    assert members(onto) == [*before, "e"]  # neither `merged` nor itself, `global`


def test_a_client_is_withdrawn_by_its_path_too(onto: Path, four: list[Path], tmp_path: Path, lora_merge: Run) -> None:
    with pytest.raises(NotFoundError, match=r"which holds org/a \(from a\), .*org/d \(from d\)\."):
        fold([], onto, withdraw=[str(tmp_path / "z")])
    assert fold([], onto, withdraw=[str(four[0])]).withdrawn == ["org/a"]
    assert lora_merge("aggregate", "--onto", "global", "--withdraw", f"../{tmp_path.name}/b/")[0] == 0
    assert members(onto) == ["c", "d"]


def test_an_estimate_is_refused_where_a_mean_keeps_a_bound(four: list[Path], tmp_path: Path) -> None:
    onto = fold(four[:2], tmp_path / "svd", method="svd", rank=4).output
    with pytest.raises(UsageError, match="--certificate probes"):
        fold(four[2:], onto, certificate="probes")


def test_a_fold_says_nothing_of_what_fedavg_would_miss(onto: Path, tmp_path: Path, lora_merge: Run) -> None:
    assert "lora_A and lora_B apart" in (onto / "README.md").read_text()
    late(tmp_path / "e")
    assert "fedavg would miss" not in lora_merge("aggregate", "e", "--onto", "global")[1]
    assert "lora_A and lora_B apart" not in (onto / "README.md").read_text()


@pytest.mark.parametrize("cap", [400.0, 0.1, 1234567.5, 1e300])
def test_a_ledger_names_a_cap_to_the_last_bit(cap: float) -> None:
    assert cap_in(capped_by(cap)) == cap


@pytest.mark.parametrize(
    "weighting", ["examples", "uniform", "examples, at most x each", "examples, at most nan each", "at most 4 each"]
)
def test_other_weightings_name_no_cap(weighting: str) -> None:
    assert cap_in(weighting) is None


def test_late_copies_are_warned_of_and_dropped_on_request(onto: Path, tmp_path: Path) -> None:
    copy = late(tmp_path / "aa", seed=1)  # as b, and before it by its id
    near = changed(late(tmp_path / "ab", seed=1), rotated)
    before = digests(onto)
    dropped = fold([copy, near], onto, screening=Screening(drop_duplicates=True))
    assert not dropped.changed
    assert [each.source for each in dropped.left_out] == ["aa", "ab"]
    assert digests(onto) == before
    warnings = fold([copy, near], onto).warnings
    assert any("org/aa has the same weights as org/b." in line for line in warnings)
    assert any("org/ab has nearly the update of org/b (cosine 1.00000)." in line for line in warnings)


@pytest.mark.parametrize("command", ["aggregate", "watch"])
def test_the_help_says_which_copy_is_kept(command: str, lora_merge: Run) -> None:
    words = " ".join(lora_merge(command, "--help")[1].replace("│", " ").split())
    assert "keep who is in already, else the first by client id." in words


def test_a_new_version_of_ones_own_is_no_copy(onto: Path, four: list[Path]) -> None:
    changed(four[1], rotated)
    made = fold([four[1]], onto, screening=Screening(drop_duplicates=True))
    assert made.replaced == ["org/b"]
    assert not any("nearly" in line for line in made.warnings)


def test_of_a_folded_mean_equal_files_are_known(four: list[Path], tmp_path: Path) -> None:
    onto = fold(four, tmp_path / "svd", method="svd", rank=4).output
    warnings = fold([late(tmp_path / "e", seed=1)], onto).warnings
    assert any("org/e has the same weights as org/b." in line for line in warnings)


def test_skip_rejected_takes_the_others_in(onto: Path, four: list[Path], tmp_path: Path) -> None:
    bad = [poison(late(tmp_path / "nan"), float("nan")), late(tmp_path / "wide", seed=8, num_examples=90)]
    tensors = load_file(bad[1] / "adapter_model.safetensors")
    tensors[LORA_A] = torch.ones(2, 40)
    save_file(tensors, bad[1] / "adapter_model.safetensors")
    thief = late(tmp_path / "other" / "thief", seed=7)
    (thief / "lora_merge.json").write_text((four[0] / "lora_merge.json").read_text())
    good, before = late(tmp_path / "e"), digests(onto)
    for folder in (*bad, thief):
        with pytest.raises(RefusedError):
            fold([folder, good], onto)
        skipping = fold([folder], onto, screening=Screening(skip_rejected=True))
        assert not skipping.changed
        assert [each.source for each in skipping.left_out] == [folder.name]
    assert digests(onto) == before
    fold([*bad, thief, good], onto, screening=Screening(skip_rejected=True))
    assert members(onto) == ["a", "b", "c", "d", "e"]
    assert sorted(each["source"] for each in ledger(onto)["left_out"]) == ["nan", "thief", "wide"]
    require_one_merge(onto, [*four, good])


def test_who_comes_in_is_no_longer_left_out_whatever_he_was_called_then(onto: Path, tmp_path: Path) -> None:
    for place, seed in (("x", 7), ("y", 8)):
        late(tmp_path / place / "e", seed=seed)
    claims = [tmp_path / "x" / "e", tmp_path / "y" / "e"]
    fold([*claims, late(tmp_path / "f")], onto, screening=Screening(skip_rejected=True))
    assert [each["source"] for each in ledger(onto)["left_out"]] == ["x/e", "y/e"]
    (tmp_path / "linked").symlink_to(claims[1])
    made = fold([tmp_path / "linked"], onto)
    assert (made.added, members(onto)[-2:]) == (["org/e"], ["e", "f"])
    assert [each["source"] for each in ledger(onto)["left_out"]] == ["x/e"]


def test_lists_hold_for_arrivals_too(onto: Path, tmp_path: Path) -> None:
    names = [str(late(tmp_path / name, seed=seed)) for name, seed in (("e", 5), ("f", 6))]
    (tmp_path / "allowed").write_text(f"{names[0]}\n")
    with pytest.raises(RefusedError, match="f: allow-list: is not on it"):
        fold(names, onto, screening=Screening(allow_list=tmp_path / "allowed"))
    fold(names, onto, screening=Screening(exclude=["org/f"]))
    assert members(onto) == ["a", "b", "c", "d", "e"]
    assert ledger(onto)["left_out"] == [{"source": "f", "reason": "org/f is excluded by org/f"}]


def test_what_is_printed_and_said_names_the_global_adapter_as_it_was_typed(
    four: list[Path], tmp_path: Path, lora_merge: Run
) -> None:
    for _ in "made", "nothing new":
        assert lora_merge("aggregate", "a", "b", "--onto", "made", "-q")[:2] == (0, "made\n")
    for onto in ("a", "./a/sub", "./made/sub"):
        code, _, err = lora_merge("aggregate", "a", "--onto", onto)
        assert (code, f"--onto {Path(onto)}" in err, "--output" in err) == (2, True, False)
    (tmp_path / "made" / "notes").touch()
    code, _, err = lora_merge("aggregate", "c", "--onto", "made")
    assert (code, "holds notes" in err, "--force" in err) == (2, True, False)


def test_the_command_line_stops_with_exit_code_3(onto: Path, tmp_path: Path, lora_merge: Run) -> None:
    changed(late(tmp_path / "e"), boosted)
    code, out, err = lora_merge("aggregate", "e", "--onto", "global")
    assert (code, out) == (3, "")
    assert "--allow-outliers" in err
    assert lora_merge("aggregate", "e", "--onto", "global", "--allow-outliers")[0] == 0
    assert members(onto)[-1] == "e"


def test_a_watch_names_whom_the_stops_keep_out_and_looks_again_when_they_change(onto: Path, tmp_path: Path) -> None:
    clients = tmp_path / "clients"
    changed(late(clients / "e"), boosted)
    late(clients / "f", seed=10, num_examples=10**6)
    late(clients / "g", seed=11)
    time, waits = [0.0], [0]

    def wait(seconds: float) -> None:
        time[0] += seconds
        waits[0] += 1
        if waits[0] == 2:
            late(tmp_path / "fixed" / "e", seed=12)
            for path in (tmp_path / "fixed" / "e").iterdir():
                path.replace(clients / "e" / path.name)

    events: list[Event] = list(
        watch([str(clients / "*")], onto, seconds=200, interval=10, wait=wait, clock=lambda: time[0])
    )
    refused = [event for event in events if isinstance(event, Refusal)]
    assert [(each.source, each.reason.split()[0]) for each in refused] == [("e", "update:"), ("f", "num_examples:")]
    assert [event.client for event in events if isinstance(event, Arrival)] == ["org/g", "org/e"]


def test_a_watch_names_who_is_in_and_keeps_an_arrival_out_until_they_are_not(four: list[Path], tmp_path: Path) -> None:
    onto, time = tmp_path / "global", [0.0]
    bad = hostile(tmp_path / "h", "num_examples")
    for folder in (bad, *four[:2]):
        fold([folder], onto)

    def wait(seconds: float) -> None:
        if not time[0]:
            fold([], onto, withdraw=["org/h"])
        time[0] += seconds

    events = list(watch([str(four[2]), str(four[3])], onto, seconds=200, interval=10, wait=wait, clock=lambda: time[0]))
    refused = [event for event in events if isinstance(event, Refusal)]
    assert [each.source for each in refused] == ["c", "d"]
    for each in refused:
        assert each.reason.startswith("org/h: num_examples: states 1e+18")
        assert f"lora-merge aggregate --onto {onto} --withdraw org/h" in each.hint
        assert "--allow-dominant" in each.hint
    assert [event.client for event in events if isinstance(event, Arrival)] == ["org/c", "org/d"]
    require_one_merge(onto, four)


def test_the_hints_of_a_watch_name_only_what_works(onto: Path, tmp_path: Path) -> None:
    poison(late(tmp_path / "in" / "nan"), float("nan"))
    hostile(tmp_path / "in" / "f", "num_examples")
    hostile(tmp_path / "in" / "g", "update")
    late(tmp_path / "in" / "silent", num_examples=None)
    time = [0.0]

    def wait(seconds: float) -> None:
        time[0] += seconds

    events = watch([str(tmp_path / "in" / "*")], onto, seconds=20, interval=10, wait=wait, clock=lambda: time[0])
    hints = {event.source: event.hint for event in events if isinstance(event, Refusal)}
    assert hints == {
        "f": "To let it in, watch with --allow-dominant.",
        "g": "To let it in, watch with --allow-outliers.",
        "nan": "It is looked at again when it changes.",
        "silent": "Let its lora_merge.json state it, or merge all clients anew without --onto, with --weights.",
    }


def test_a_watch_leaves_out_copies_where_it_is_asked_to(onto: Path, tmp_path: Path) -> None:
    late(tmp_path / "clients" / "e", seed=1)
    time = [0.0]

    def wait(seconds: float) -> None:
        time[0] += seconds

    events = list(
        watch(
            [str(tmp_path / "clients" / "*")],
            onto,
            seconds=100,
            screening=Screening(drop_duplicates=True),
            wait=wait,
            clock=lambda: time[0],
        )
    )
    assert [event.reason for event in events if isinstance(event, Refusal)] == ["has the same weights as org/b"]
