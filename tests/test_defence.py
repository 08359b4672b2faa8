"""Robust rules through files: whose weight they change, what the records say of it, and that it can be made again."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lora_merge import aggregate
from lora_merge.aggregation.robust import Robust
from lora_merge.errors import MissingBaseError, UsageError, VerificationError
from lora_merge.verify import verify
from tests.adapters import KINDS, PLAIN, Client, Kind, adapter, edited, save
from tests.conftest import Federations, digests
from tests.dense import delta_weights, distance_from_mean, error, mean_deltas, mean_model, relative

CLIP, MEDIAN, KRUM = Robust(clip="0.9x"), Robust(rule="geometric-median"), Robust(rule="krum", byzantine=0)
MADE: dict[str, dict[str, Any]] = {
    "clip": {"robust": CLIP},
    "geometric median": {"robust": MEDIAN},
    "clip, then geometric median": {"robust": Robust(clip=1.0, rule="geometric-median"), "method": "svd", "rank": 3},
    "krum": {"robust": KRUM},
    "multi-krum": {"robust": Robust(rule="multi-krum", byzantine=0), "method": "fedavg"},
    "median": {"robust": Robust(rule="median")},
    "clip, then trimmed mean": {"robust": Robust(clip="1x", rule="trimmed-mean", trim=0.2), "method": "svd", "rank": 2},
    "ties": {"method": "ties", "rank": 3, "density": 0.3},
    "dare": {"method": "dare", "seed": 5, "density": 0.4},
}
each_made = pytest.mark.parametrize("name", MADE)


def boosted(folder: Path, to: Path, times: float) -> Path:
    return edited(folder, to, tensors=lambda t: {k: v * times if "lora_B" in k else v for k, v in t.items()})


@pytest.mark.parametrize("rule", [CLIP, MEDIAN], ids=["clip", "geometric median"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_of_adapter_merges_by_the_weights_that_the_ledger_tells(
    kind: Kind, rule: Robust, federations: Federations, tmp_path: Path
) -> None:
    made = federations(kind)
    ledger = aggregate(made.clients, tmp_path / "global", robust=rule, base=made.base, screening=None).ledger
    shares = [each.merged_share for each in ledger.contributions]
    assert sum(filter(None, shares)) < 0.999 if rule.clips else sum(filter(None, shares)) == pytest.approx(1, abs=1e-5)
    told = [share for share in shares if share is not None]
    assert len(told) == len(made.clients)
    assert error(kind, tmp_path / "global", mean_model(kind, made.clients, told)) < 1e-5
    assert [each.share for each in ledger.contributions] == pytest.approx(kind.weights)


@each_made
def test_verify_makes_it_again_from_the_lock(name: str, plain: tuple[Path, ...], tmp_path: Path) -> None:
    result = aggregate(plain, tmp_path / "global", **MADE[name])
    assert verify(tmp_path / "global", plain).verdict == "identical"
    lock = json.loads((tmp_path / "global" / "lora-merge.lock").read_text())
    assert lock["options"] == result.ledger.options
    assert lock["options"].items() >= MADE[name].get("robust", Robust()).to_json().items()
    lock["options"] = {key: value for key, value in lock["options"].items() if key in ("rank", "energy", "seed")}
    (tmp_path / "global" / "lora-merge.lock").write_text(json.dumps(lock))
    assert verify(tmp_path / "global", plain).verdict == "different"


@each_made
def test_the_order_of_the_clients_and_the_workers_do_not_change_a_byte(
    name: str, plain: tuple[Path, ...], tmp_path: Path
) -> None:
    aggregate(plain, tmp_path / "one" / "global", workers=1, **MADE[name])
    aggregate(plain[::-1], tmp_path / "two" / "global", workers=3, **MADE[name])
    assert digests(tmp_path / "one" / "global") == digests(tmp_path / "two" / "global")


@each_made
def test_the_distance_from_the_mean_is_told(name: str, plain: tuple[Path, ...], tmp_path: Path) -> None:
    made = dict(MADE[name])
    if made.get("method") in ("svd", "ties", "dare"):
        made["rank"] = "lossless"
    if made.get("method") == "fedavg":
        del made["method"]
    ledger = aggregate(plain, tmp_path / "global", **made).ledger
    wanted, got = mean_deltas(PLAIN, plain), delta_weights(PLAIN, tmp_path / "global")
    apart = sum(float((got[name] - wanted[name]).square().sum()) for name in wanted)
    size = sum(float(wanted[name].square().sum()) for name in wanted)
    assert ledger.from_mean is not None
    assert ledger.from_mean["relative_error"] == pytest.approx((apart / size) ** 0.5, rel=1e-2)
    assert ledger.certificate.whole is not None
    assert ledger.certificate.whole["relative_error"] < 1e-6


@pytest.mark.parametrize("name", ["clip, then trimmed mean", "median", "ties", "dare", "clip"])
def test_it_is_told_without_a_certificate_too(name: str, federations: Federations, tmp_path: Path) -> None:
    made = federations(next(kind for kind in KINDS if kind.name == "modules_to_save"))
    told = [
        aggregate(made.clients, tmp_path / str(mode), base=made.base, certificate=mode, **MADE[name]).ledger.from_mean
        for mode in (None, "off")
    ]
    assert told[0] == told[1] is not None


@pytest.mark.parametrize("method", ["ties", "dare"])
@pytest.mark.parametrize("name", ["modules_to_save", "tokens", "bias that some lack"])
def test_what_was_trained_whole_is_a_part_of_the_mean_that_the_distance_is_relative_to(
    name: str, method: str, federations: Federations, tmp_path: Path
) -> None:
    made = federations(next(kind for kind in KINDS if kind.name == name))
    ledger = aggregate(made.clients, tmp_path / "global", base=made.base, method=method, rank="lossless").ledger
    apart = distance_from_mean(made.kind, made.clients, tmp_path / "global")
    assert ledger.from_mean is not None
    assert ledger.from_mean["relative_error"] == pytest.approx(apart, rel=6e-3)


@pytest.mark.parametrize("certificate", [None, "off"])
@pytest.mark.parametrize(("method", "rule"), [("ties", KRUM), ("ties", MEDIAN), ("dare", CLIP), ("dare", MEDIAN)])
def test_how_far_ties_or_dare_by_the_weights_of_a_rule_is_from_the_plain_mean_is_not_told(
    method: str, rule: Robust, certificate: Any, plain: tuple[Path, ...], tmp_path: Path
) -> None:
    """Each is held against the mean by those weights; what the rule dropped is read no more."""
    ledger = aggregate(plain, tmp_path / "global", method=method, robust=rule, certificate=certificate).ledger
    assert ledger.from_mean is None
    assert ledger.aim.startswith(f"what {method} makes of the ")
    assert ledger.aim.endswith({KRUM: "of Krum", MEDIAN: "of the geometric median", CLIP: "of the clients"}[rule])


def test_without_a_rule_nothing_is_told(plain: tuple[Path, ...], tmp_path: Path) -> None:
    ledger = aggregate(plain, tmp_path / "global", robust=Robust(clip="off")).ledger
    assert (ledger.from_mean, ledger.clip_norm, ledger.options) == (None, None, {"seed": 0})
    assert {(each.clipped_to, each.merged_share) for each in ledger.contributions} == {(None, None)}
    assert ledger.aim == "the weighted mean of the clients' updates"


def test_a_clip_that_touches_nobody_gives_the_plain_merge(plain: tuple[Path, ...], tmp_path: Path) -> None:
    aggregate(plain, tmp_path / "plain")
    ledger = aggregate(plain, tmp_path / "clipped", robust=Robust(clip="100x")).ledger
    weights = "adapter_model.safetensors"
    assert digests(tmp_path / "plain")[weights] == digests(tmp_path / "clipped")[weights]
    assert ledger.from_mean == {"relative_error": 0.0}


def test_a_boosted_client_is_clipped_to_the_limit_and_the_stop_of_boosted_norms_stands_back(
    plain: tuple[Path, ...], tmp_path: Path
) -> None:
    bad = boosted(plain[0], tmp_path / "bad", 1000.0)
    ledger = aggregate([bad, *plain], tmp_path / "global", robust=Robust(clip="3x"), weights="uniform").ledger
    clipped = {each.client_id: each.clipped_to for each in ledger.contributions}
    assert {client for client, scale in clipped.items() if scale is not None} == {"org/bad"}
    assert ledger.clip_norm is not None
    sizes = [sum(float(d.square().sum()) for d in delta_weights(PLAIN, f).values()) ** 0.5 for f in (bad, *plain)]
    assert ledger.clip_norm == pytest.approx(3 * sum(sorted(sizes)[1:3]) / 2, rel=1e-4)
    assert clipped["org/bad"] == pytest.approx(ledger.clip_norm / sizes[0], rel=1e-4)


def test_what_krum_drops_is_not_in_the_file(plain: tuple[Path, ...], tmp_path: Path) -> None:
    near = [edited(plain[0], tmp_path / f"near-{i}") for i in range(3)]
    extra = Client({"target_modules": ["q_proj", "down_proj"], "r": 7})
    far = save(adapter(PLAIN.build(), extra, 9), tmp_path / "far")
    ledger = aggregate([*near, far], tmp_path / "global", robust=Robust(rule="krum", byzantine=0)).ledger
    assert {each.client_id: each.merged_share for each in ledger.contributions}["org/far"] == 0
    file = load_file(tmp_path / "global" / "adapter_model.safetensors")
    assert not any("down_proj" in name for name in file)
    got, wanted = delta_weights(PLAIN, tmp_path / "global"), delta_weights(PLAIN, plain[0])
    assert all(relative(got[name] - wanted[name], wanted[name]) < 1e-6 for name in wanted)


def test_a_rule_that_weighs_needs_the_base_of_whole_tensors(federations: Federations, tmp_path: Path) -> None:
    made = federations(next(kind for kind in KINDS if kind.name == "modules_to_save"))
    with pytest.raises(MissingBaseError) as caught:
        aggregate(made.clients, tmp_path / "global", robust=CLIP)
    assert any("lm_head" in name for name in caught.value.tensors)
    assert list(tmp_path.iterdir()) == []


def test_too_few_clients_for_krum_are_a_usage_error_and_nothing_is_written(
    plain: tuple[Path, ...], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="among 5 or more; here are 3"):
        aggregate(plain, tmp_path / "global", robust=Robust(rule="krum", byzantine=1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["fedavg", "ffa", "ties", "dare"])
@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_a_coordinate_rule_has_no_mean_to_replace_in_other_methods(
    method: str, rule: str, plain: tuple[Path, ...], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="a mean of its own"):
        aggregate(plain, tmp_path / "global", method=method, robust=Robust(rule=rule))


def test_clipping_would_do_nothing_to_ties_and_is_refused_with_it(plain: tuple[Path, ...], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="divides by the weight"):
        aggregate(plain, tmp_path / "global", method="ties", robust=CLIP)


def test_another_rule_is_a_change_under_locked(plain: tuple[Path, ...], tmp_path: Path) -> None:
    aggregate(plain, tmp_path / "global", robust=MEDIAN)
    aggregate(plain, tmp_path / "global", robust=MEDIAN, locked=True, force=True)
    with pytest.raises(VerificationError, match="options"):
        aggregate(plain, tmp_path / "global", robust=KRUM, locked=True, force=True)


def test_the_card_says_what_was_done_to_whom(plain: tuple[Path, ...], tmp_path: Path) -> None:
    bad = boosted(plain[0], tmp_path / "bad", 1000.0)
    rule = Robust(clip="3x", rule="multi-krum", byzantine=0)
    aggregate([bad, *plain], tmp_path / "global", robust=rule, weights="uniform")
    card = (tmp_path / "global" / "README.md").read_text()
    assert "scaled down to it: org/bad (to " in card
    assert "Weights by `multi-krum`: org/" in card
    assert "away from the plain weighted mean" in card
    assert "--clip 3x --robust multi-krum --byzantine 0" in card
