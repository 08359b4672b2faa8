"""Every kind of adapter merges into exactly the mean of the whole models, judged by PEFT's own forward pass."""

from pathlib import Path

import pytest

from lora_merge import aggregate
from lora_merge.errors import MissingBaseError, RefusedError
from tests.adapters import EXACT_OR_REFUSED, KINDS, PLAIN, Kind, edited
from tests.conftest import Federations
from tests.dense import error, mean_model

# Of the update's effect on the logits. What is written is fp32, so a few units of 6e-8, grown by the layers above.
TOLERANCE = 5e-6

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@each_kind
def test_exact_is_the_mean_of_the_whole_models(kind: Kind, federations: Federations, tmp_path: Path) -> None:
    made = federations(kind)
    aggregate(made.clients, tmp_path / "global", base=made.base_argument)
    assert error(kind, tmp_path / "global", mean_model(kind, made.clients, kind.weights)) < TOLERANCE


@each_kind
def test_global_lr_scales_the_distance_from_the_base(kind: Kind, federations: Federations, tmp_path: Path) -> None:
    made = federations(kind)
    aggregate(made.clients, tmp_path / "global", base=made.base, global_lr=0.6)
    assert error(kind, tmp_path / "global", mean_model(kind, made.clients, kind.weights, 0.6)) < TOLERANCE


@each_kind
def test_svd_without_loss_is_the_mean_of_the_whole_models(kind: Kind, federations: Federations, tmp_path: Path) -> None:
    made = federations(kind)
    aggregate(made.clients, tmp_path / "global", method="svd", rank="lossless", base=made.base_argument)
    assert error(kind, tmp_path / "global", mean_model(kind, made.clients, kind.weights)) < TOLERANCE


@each_kind
def test_one_client_gives_that_client_back(kind: Kind, federations: Federations, tmp_path: Path) -> None:
    made = federations(kind)
    for folder in made.clients:
        out = tmp_path / folder.name
        aggregate([folder], out, base=made.base_argument)
        assert error(kind, out, mean_model(kind, [folder], [1.0])) < TOLERANCE


@each_kind
def test_a_rank_of_two_reloads_in_peft_with_every_tensor_used(
    kind: Kind, federations: Federations, tmp_path: Path
) -> None:
    made = federations(kind)
    aggregate(made.clients, tmp_path / "global", method="svd", rank=2, base=made.base_argument)
    assert error(kind, tmp_path / "global", mean_model(kind, made.clients, kind.weights)) < 2.0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.needs_base], ids=lambda kind: kind.name)
def test_a_base_that_the_answer_needs_and_nobody_gave_is_an_error_that_names_its_tensors(
    kind: Kind, federations: Federations, tmp_path: Path
) -> None:
    with pytest.raises(MissingBaseError) as caught:
        aggregate(federations(kind).clients, tmp_path / "global")
    assert caught.value.tensors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_head_saved_along_with_its_lora_that_is_not_the_others_is_no_copy_of_the_base(
    part: str, federations: Federations, tmp_path: Path
) -> None:
    """Its vocabulary may have been resized: it counts as if it were trained."""
    made = federations(next(kind for kind in KINDS if kind.name == "head with a bias"))
    name = f"base_model.model.lm_head.base_layer.{part}"
    other = edited(made.clients[0], tmp_path / "other", tensors=lambda own: {**own, name: own[name] + 1})
    folders = [other, made.clients[1]]
    aggregate(folders, tmp_path / "global")
    assert error(made.kind, tmp_path / "global", mean_model(made.kind, folders, made.kind.weights)) < TOLERANCE
    with pytest.raises(MissingBaseError, match=f"lm_head.{part}"):
        aggregate([*folders, federations(PLAIN).clients[0]], tmp_path / "three")


def test_a_head_that_one_client_alone_saved_along_is_held_against_the_base(
    federations: Federations, tmp_path: Path
) -> None:
    made = federations(next(kind for kind in KINDS if kind.name == "head with a bias"))
    name = "base_model.model.lm_head.base_layer.weight"
    lie = edited(made.clients[0], tmp_path / "lie", tensors=lambda own: {**own, name: own[name] + 1})
    plain = edited(
        made.clients[1],
        tmp_path / "plain",
        config={"target_modules": ["q_proj"]},
        tensors=lambda own: {key: value for key, value in own.items() if "lm_head" not in key},
    )
    for head in (made.clients[0], lie):
        folders, output = [head, plain], tmp_path / f"global of {head.name}"
        with pytest.raises(MissingBaseError, match=r"lm_head\.weight"):
            aggregate(folders, output, weights="uniform")
        aggregate(folders, output, weights="uniform", base=made.base, screening=None)
        assert error(made.kind, output, mean_model(made.kind, folders, [0.5, 0.5])) < TOLERANCE


@pytest.mark.parametrize("kind", EXACT_OR_REFUSED, ids=lambda kind: kind.name)
def test_what_the_files_leave_open_is_merged_exactly_or_refused(
    kind: Kind, federations: Federations, tmp_path: Path
) -> None:
    made = federations(kind)
    refusal = None
    try:
        aggregate(made.clients, tmp_path / "global", base=made.base_argument)
    except RefusedError as refused:
        refusal = refused
    if refusal:
        assert all(problem.client and problem.field and problem.reason for problem in refusal.problems)
        assert list(tmp_path.iterdir()) == []
    else:
        assert error(kind, tmp_path / "global", mean_model(kind, made.clients, kind.weights)) < TOLERANCE
