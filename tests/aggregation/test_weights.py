"""Where p_i comes from: the examples that clients state, one each, or what the user says; and nothing else."""

from pathlib import Path
from typing import Any

import pytest

from lora_merge import aggregate
from lora_merge.errors import NotFoundError, RefusedError, UsageError
from tests.adapters import PLAIN, edited, rewrite_json
from tests.dense import error, mean_model

Folders = tuple[Path, ...]
TOLERANCE = 5e-6


def silent(folder: Path, to: Path) -> Path:
    """The client without its statement."""
    edited(folder, to)
    (to / "lora_merge.json").unlink()
    return to


def judged(out: Path, folders: Folders, p: list[float]) -> float:
    return error(PLAIN, out, mean_model(PLAIN, folders, p))


def test_the_default_is_by_num_examples(plain: Folders, tmp_path: Path) -> None:
    aggregate(plain, tmp_path / "global")
    assert judged(tmp_path / "global", plain, [10 / 60, 20 / 60, 30 / 60]) < TOLERANCE


def test_uniform_counts_every_client_once(plain: Folders, tmp_path: Path) -> None:
    aggregate(plain, tmp_path / "global", weights="uniform")
    assert judged(tmp_path / "global", plain, [1 / 3] * 3) < TOLERANCE


def test_given_weights_go_by_client_id_or_by_the_source_as_given(plain: Folders, tmp_path: Path) -> None:
    given = {"org/client-0": 1, str(plain[1]): 0.5, "org/client-2": 2.5}
    aggregate([str(folder) for folder in plain], tmp_path / "global", weights=given)
    assert judged(tmp_path / "global", plain, [0.25, 0.125, 0.625]) < TOLERANCE


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e15, 1e29])
def test_the_size_of_the_weights_does_not_matter(size: float, plain: Folders, tmp_path: Path) -> None:
    weights = {"org/client-0": size, "org/client-1": 2 * size, "org/client-2": 3 * size}
    for method in ("exact", "svd", "fedavg"):
        options = {"rank": "lossless"} if method == "svd" else {}
        aggregate(plain, tmp_path / method, method=method, weights=weights, **options)
    assert judged(tmp_path / "exact", plain, PLAIN.weights) < TOLERANCE
    assert judged(tmp_path / "svd", plain, PLAIN.weights) < TOLERANCE


@pytest.mark.parametrize("size", [5e-324, 1e-320, 1e-40, 1e31, 1e300, 1.7e308, 10**400])
def test_weights_out_of_the_range_of_the_arithmetic_are_a_usage_error(
    size: float, plain: Folders, tmp_path: Path
) -> None:
    for others in (1, size):
        with pytest.raises(UsageError, match="must be 0, or from 1e-30 to 1e\\+30"):
            aggregate(plain, tmp_path / "global", weights={f"org/client-{i}": size if i else others for i in range(3)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["exact", "svd", "fedavg", "ties", "dare"])
@pytest.mark.parametrize("global_lr", [1e-30, 1e30])
def test_a_factor_at_an_end_of_the_range_is_merged(
    global_lr: float, method: str, plain: Folders, tmp_path: Path
) -> None:
    weights = {"org/client-0": 1e-30, "org/client-1": 1.0, "org/client-2": 1e30}
    aggregate(plain, tmp_path / "global", method=method, global_lr=global_lr, weights=weights)


@pytest.mark.parametrize(
    "weights",
    [
        {"org/client-0": -1, "org/client-1": 1, "org/client-2": 1},
        {"org/client-0": float("nan"), "org/client-1": 1, "org/client-2": 1},
        {"org/client-0": float("inf"), "org/client-1": 1, "org/client-2": 1},
        {"org/client-0": 0, "org/client-1": 0, "org/client-2": 0},
        {"org/client-0": "1", "org/client-1": 1, "org/client-2": 1},
        {"org/client-0": True, "org/client-1": 1, "org/client-2": 1},
        {"org/client-0": 1, "org/client-1": 1},
        {"org/client-0": 1, "org/client-1": 1, "org/client-2": 1, "org/client-3": 1},
        {},
        "sizes",
    ],
    ids=str,
)
def test_weights_that_are_none_are_a_usage_error(weights: Any, plain: Folders, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        aggregate(plain, tmp_path / "global", weights=weights)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("global_lr", [float("nan"), float("inf"), 0.0, 1e-320, 1e39, 1e308, -1.0, "1", True])
def test_a_global_lr_that_is_no_number_in_range_is_a_usage_error(
    global_lr: Any, plain: Folders, tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        aggregate(plain, tmp_path / "global", global_lr=global_lr)
    assert list(tmp_path.iterdir()) == []


def test_a_client_that_states_no_count_has_no_default_weight_and_is_named(plain: Folders, tmp_path: Path) -> None:
    folders = (plain[0], silent(plain[1], tmp_path / "in" / "quiet"), plain[2])
    with pytest.raises(UsageError, match="quiet") as caught:
        aggregate(folders, tmp_path / "global")
    assert "uniform" in caught.value.hint
    aggregate(folders, tmp_path / "global", weights="uniform")
    assert judged(tmp_path / "global", plain, [1 / 3] * 3) < TOLERANCE


def test_counts_that_are_all_zero_are_a_usage_error(plain: Folders, tmp_path: Path) -> None:
    folders = [edited(folder, tmp_path / folder.name) for folder in plain]
    for folder in folders:
        rewrite_json(folder / "lora_merge.json", {"num_examples": 0})
    with pytest.raises(UsageError):
        aggregate(folders, tmp_path / "global")


def test_two_sources_that_claim_one_client_id_are_refused(plain: Folders, tmp_path: Path) -> None:
    thief = edited(plain[1], tmp_path / "in" / "thief", client_id="org/client-0")
    with pytest.raises(RefusedError, match="org/client-0"):
        aggregate([plain[0], thief], tmp_path / "global")


def test_one_folder_given_twice_is_an_error_and_not_a_double_weight(plain: Folders, tmp_path: Path) -> None:
    with pytest.raises((RefusedError, UsageError)):
        aggregate([plain[0], plain[0], plain[1]], tmp_path / "global")
    (tmp_path / "alias").symlink_to(plain[0])
    with pytest.raises((RefusedError, UsageError)):
        aggregate([plain[0], tmp_path / "alias"], tmp_path / "global")


def test_a_source_that_is_not_there_is_not_found(plain: Folders, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        aggregate([plain[0], tmp_path / "nowhere"], tmp_path / "global")


def test_no_source_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises((NotFoundError, UsageError)):
        aggregate([], tmp_path / "global")


def test_clients_that_fine_tuned_other_weights_are_refused(plain: Folders, tmp_path: Path) -> None:
    folders = [edited(folder, tmp_path / folder.name) for folder in plain]
    for folder, digest in zip(folders, ["a" * 64, "a" * 64, "b" * 64], strict=True):
        rewrite_json(folder / "lora_merge.json", {"base_model": {"repo": "org/tiny", "weights_sha256": digest}})
    with pytest.raises(RefusedError) as caught:
        aggregate(folders, tmp_path / "global")
    assert "org/client-2" in {problem.client for problem in caught.value.problems}


def test_clients_of_another_base_model_are_refused(plain: Folders, tmp_path: Path) -> None:
    other = edited(plain[1], tmp_path / "in" / "other")
    rewrite_json(other / "lora_merge.json", {"base_model": {"repo": "org/another"}})
    with pytest.raises(RefusedError, match="another"):
        aggregate([plain[0], other, plain[2]], tmp_path / "global")


@pytest.mark.parametrize("method", ["", "mean", "EXACT", None])
def test_an_unknown_method_is_a_usage_error(method: Any, plain: Folders, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        aggregate(plain, tmp_path / "global", method=method)


@pytest.mark.parametrize(
    ("option", "value"), [("dtype", "fp8"), ("device", "abacus"), ("certificate", "maybe"), ("workers", 0)]
)
def test_an_option_that_is_none_is_a_usage_error(option: str, value: Any, plain: Folders, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        aggregate(plain, tmp_path / "global", **{option: value})
    assert list(tmp_path.iterdir()) == []


def test_what_is_at_the_output_already_is_not_overwritten(plain: Folders, tmp_path: Path) -> None:
    (tmp_path / "global").mkdir()
    (tmp_path / "global" / "precious").write_text("mine")
    with pytest.raises(UsageError):
        aggregate(plain, tmp_path / "global")
    assert [path.name for path in (tmp_path / "global").iterdir()] == ["precious"]
