"""The laws that each method declares where it is registered, and the ones that it is known to break.

A new method is picked up from the registry: it is held to every law it declares, and a law that it does not declare
needs a broken example here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_merge import aggregate
from lora_merge.aggregation.methods import METHODS
from lora_merge.errors import RefusedError
from tests.adapters import PLAIN, edited
from tests.conftest import digests
from tests.dense import base_model, delta_weights, error, loaded, mean_deltas, mean_model, relative
from tests.models import logits

LAWS = ("identity", "order", "rotation", "scale", "exact", "absent")
OPTIONS: dict[str, dict[str, Any]] = {"svd": {"rank": 3}, "ties": {"rank": "lossless"}, "dare": {"rank": "lossless"}}
TOLERANCE = 5e-6

Tensors = dict[str, torch.Tensor]
Folders = tuple[Path, ...]


def keeping(law: str) -> Any:
    """Parametrise a test over the methods that declare `law`."""
    return pytest.mark.parametrize("method", sorted(name for name in METHODS if law in METHODS[name].laws))


@pytest.fixture
def folders(method: str, plain: Folders, tmp_path: Path) -> Folders:
    """Three clients that the method accepts: for ffa with one lora_A, as it demands."""
    return shared_lora_a(plain, tmp_path / "shared") if method == "ffa" else plain


def shared_lora_a(folders: Folders, root: Path) -> Folders:
    """The same clients, all with the first one's lora_A."""
    from safetensors.torch import load_file

    start = {k: v for k, v in load_file(folders[0] / "adapter_model.safetensors").items() if ".lora_A." in k}
    return tuple(edited(folder, root / folder.name, tensors=lambda own: {**own, **start}) for folder in folders)


def merge(method: str, folders: Folders, out: Path, **options: Any) -> Path:
    aggregate(folders, out, method=method, **{**OPTIONS.get(method, {}), **options})
    return out


def distance(first: Path, second: Path) -> float:
    """How far two merges' answers are apart, relative to what the first one changed."""
    start, one, two = logits(base_model(PLAIN)), logits(loaded(PLAIN, first)), logits(loaded(PLAIN, second))
    return relative(one - two, one - start)


def rotate(tensors: Tensors) -> Tensors:
    """(R A, B inv(R)) for a random invertible R of each module: another file of the same function."""
    generator = torch.Generator().manual_seed(3)
    out = dict(tensors)
    for name, A in tensors.items():
        if ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            R = torch.eye(len(A), dtype=torch.float64)
            R += 0.4 * torch.randn(len(A), len(A), generator=generator, dtype=torch.float64)
            out[name] = (R @ A.double()).float()
            out[other] = (tensors[other].double() @ torch.linalg.inv(R)).float()
    return out


def test_the_methods_and_the_laws_they_declare() -> None:
    assert {name: set(method.laws) for name, method in METHODS.items()} == {
        "exact": {"identity", "order", "rotation", "scale", "exact", "absent"},
        "svd": {"order", "rotation", "scale", "absent"},
        "fedavg": {"identity", "order", "scale"},
        "ffa": {"identity", "order", "scale", "exact", "absent"},
        "ties": {"order", "rotation", "scale"},
        "dare": {"order", "rotation", "scale"},
    }


def test_every_law_that_a_method_does_not_declare_has_a_broken_example_here() -> None:
    assert {(name, law) for name in METHODS for law in LAWS if law not in METHODS[name].laws} == BROKEN.keys()


@keeping("identity")
def test_one_client_gives_that_clients_function_back(method: str, folders: Folders, tmp_path: Path) -> None:
    out = merge(method, folders[:1], tmp_path / "global")
    assert error(PLAIN, out, mean_model(PLAIN, folders[:1], [1.0])) < TOLERANCE


@keeping("identity")
def test_identical_clients_give_that_client(method: str, folders: Folders, tmp_path: Path) -> None:
    copies = tuple(edited(folders[0], tmp_path / f"copy-{i}") for i in range(3))
    out = merge(method, copies, tmp_path / "global", weights={f"org/copy-{i}": i + 1 for i in range(3)})
    assert error(PLAIN, out, mean_model(PLAIN, folders[:1], [1.0])) < TOLERANCE


@keeping("order")
def test_the_order_of_the_clients_does_not_change_a_byte(method: str, folders: Folders, tmp_path: Path) -> None:
    first = digests(merge(method, folders, tmp_path / "first" / "global"))
    assert digests(merge(method, folders[::-1], tmp_path / "second" / "global")) == first
    assert digests(merge(method, (*folders[1:], folders[0]), tmp_path / "third" / "global")) == first


@keeping("rotation")
def test_rotating_a_clients_factors_changes_nothing(method: str, folders: Folders, tmp_path: Path) -> None:
    assert distance(*rotated_pair(method, folders, tmp_path)) < 2e-5


@keeping("scale")
def test_scaling_every_weight_changes_nothing(method: str, folders: Folders, tmp_path: Path) -> None:
    weights = {"org/client-0": 1.0, "org/client-1": 0.25, "org/client-2": 3.0}
    one = merge(method, folders, tmp_path / "one", weights=weights)
    scaled = {name: 1e6 * weight / 3 for name, weight in weights.items()}
    assert distance(one, merge(method, folders, tmp_path / "two", weights=scaled)) < TOLERANCE


@keeping("exact")
def test_the_result_is_the_mean_of_the_dense_updates(method: str, folders: Folders, tmp_path: Path) -> None:
    out = merge(method, folders, tmp_path / "global")
    wanted, got = mean_deltas(PLAIN, folders), delta_weights(PLAIN, out)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert relative(got[name] - wanted[name], wanted[name]) < 1e-6


@keeping("absent")
def test_a_client_without_a_module_counts_there_as_zero(method: str, folders: Folders, tmp_path: Path) -> None:
    lacking = without_v_proj(folders[0], tmp_path / "client-0")
    out = merge(method, (lacking, *folders[1:]), tmp_path / "global", weights="uniform", **lossless(method))
    assert error(PLAIN, out, mean_model(PLAIN, (lacking, *folders[1:]), [1 / 3] * 3)) < TOLERANCE


@pytest.mark.parametrize("method", sorted(METHODS))
def test_global_lr_scales_the_update(method: str, folders: Folders, tmp_path: Path) -> None:
    whole = delta_weights(PLAIN, merge(method, folders, tmp_path / "whole"))
    half = delta_weights(PLAIN, merge(method, folders, tmp_path / "half", global_lr=0.5))
    for name in whole:
        assert relative(half[name] - 0.5 * whole[name], whole[name]) < 1e-6


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_client_of_weight_zero_changes_nothing(method: str, folders: Folders, tmp_path: Path) -> None:
    weights = {"org/client-0": 2.0, "org/client-1": 1.0}
    two = merge(method, folders[:2], tmp_path / "two", weights=weights)
    three = merge(method, folders, tmp_path / "three", weights={**weights, "org/client-2": 0.0})
    assert distance(two, three) < TOLERANCE


def test_fedavg_averages_lora_a_over_those_that_have_it_and_lora_b_over_all(plain: Folders, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    lacking = without_v_proj(plain[0], tmp_path / "client-0")
    weights = {"org/client-0": 1.0, "org/client-1": 2.0, "org/client-2": 5.0}
    out = merge("fedavg", (lacking, *plain[1:]), tmp_path / "global", weights=weights)
    files = [load_file(folder / "adapter_model.safetensors") for folder in plain]
    name = "model.layers.1.self_attn.v_proj"
    A = [file[f"base_model.model.{name}.lora_A.weight"].double() for file in files]
    B = [file[f"base_model.model.{name}.lora_B.weight"].double() for file in files]
    scaling = 8 / 4
    wanted = scaling * (2 / 8 * B[1] + 5 / 8 * B[2]) @ (2 / 7 * A[1] + 5 / 7 * A[2])
    got = delta_weights(PLAIN, out)[f"{name}.weight"]
    assert relative(got - wanted, wanted) < 1e-6


def test_ffa_refuses_clients_whose_lora_a_differ_and_names_them(plain: Folders, tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        merge("ffa", plain, tmp_path / "global")
    for problem in caught.value.problems:
        assert problem.client == "all clients"  # neither of two that differ is the wrong one
        assert "lora_A of org/client-0 and org/client-1 differ" in problem.reason
    assert list(tmp_path.iterdir()) == []


def test_exact_keeps_the_rank_of_clients_that_share_one_lora_a(plain: Folders, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folders = shared_lora_a(plain, tmp_path / "shared")
    out = merge("exact", folders, tmp_path / "global")
    assert {min(t.shape) for t in load_file(out / "adapter_model.safetensors").values()} == {4}
    assert error(PLAIN, out, mean_model(PLAIN, folders, PLAIN.weights)) < TOLERANCE


def test_exact_never_writes_a_rank_above_the_modules_own(plain: Folders, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    copies = tuple(edited(plain[i % 3], tmp_path / f"copy-{i}") for i in range(6))  # K = 24 of 16 x 16 and 8 x 16
    out = merge("exact", copies, tmp_path / "global", weights="uniform")
    file = load_file(out / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in file.items() if "q_proj.lora_A" in name} == {16}
    assert {len(tensor) for name, tensor in file.items() if "v_proj.lora_A" in name} == {8}
    assert error(PLAIN, out, mean_model(PLAIN, plain, [1 / 3] * 3)) < TOLERANCE


def lossless(method: str) -> dict[str, Any]:
    return {"rank": "lossless"} if method == "svd" else {}


def rotated_pair(method: str, folders: Folders, tmp_path: Path) -> tuple[Path, Path]:
    """The merge of the clients, and of the same clients with one of them rotated."""
    turned = edited(folders[0], tmp_path / "client-0", tensors=rotate)
    one = merge(method, folders, tmp_path / "one")
    return one, merge(method, (turned, *folders[1:]), tmp_path / "two")


def without_v_proj(folder: Path, to: Path) -> Path:
    def lacking(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if "v_proj" not in name}

    return edited(folder, to, tensors=lacking, config={"target_modules": ["q_proj"]})


def fedavg_moves_with_a_rotation(folders: Folders, tmp_path: Path) -> None:
    assert distance(*rotated_pair("fedavg", folders, tmp_path)) > 0.05


def fedavg_is_not_the_mean(folders: Folders, tmp_path: Path) -> None:
    out = merge("fedavg", folders, tmp_path / "global")
    assert error(PLAIN, out, mean_model(PLAIN, folders, PLAIN.weights)) > 0.2


def fedavg_is_not_the_mean_where_a_client_lacks_a_module(folders: Folders, tmp_path: Path) -> None:
    lacking = without_v_proj(folders[0], tmp_path / "client-0")
    out = merge("fedavg", (lacking, *folders[1:]), tmp_path / "global")
    assert error(PLAIN, out, mean_model(PLAIN, (lacking, *folders[1:]), PLAIN.weights)) > 0.2


def ffa_refuses_a_rotated_client(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(RefusedError):
        rotated_pair("ffa", shared_lora_a(folders, tmp_path / "shared"), tmp_path)


def svd_loses_what_a_client_has_above_the_rank(folders: Folders, tmp_path: Path) -> None:
    out = merge("svd", folders[:1], tmp_path / "global", rank=3)
    assert error(PLAIN, out, mean_model(PLAIN, folders[:1], [1.0])) > 0.05


def svd_is_not_the_mean(folders: Folders, tmp_path: Path) -> None:
    out = merge("svd", folders, tmp_path / "global", rank=4)
    assert error(PLAIN, out, mean_model(PLAIN, folders, PLAIN.weights)) > 0.05


def a_client_alone_loses_entries(method: str) -> Callable[[Folders, Path], None]:
    def broken(folders: Folders, tmp_path: Path) -> None:
        out = merge(method, folders[:1], tmp_path / "global")
        assert error(PLAIN, out, mean_model(PLAIN, folders[:1], [1.0])) > 0.05

    return broken


def is_not_the_mean(method: str) -> Callable[[Folders, Path], None]:
    def broken(folders: Folders, tmp_path: Path) -> None:
        out = merge(method, folders, tmp_path / "global")
        assert error(PLAIN, out, mean_model(PLAIN, folders, PLAIN.weights)) > 0.2

    return broken


def is_not_the_mean_where_a_client_lacks_a_module(method: str) -> Callable[[Folders, Path], None]:
    def broken(folders: Folders, tmp_path: Path) -> None:
        lacking = without_v_proj(folders[0], tmp_path / "client-0")
        out = merge(method, (lacking, *folders[1:]), tmp_path / "global")
        assert error(PLAIN, out, mean_model(PLAIN, (lacking, *folders[1:]), PLAIN.weights)) > 0.2

    return broken


BROKEN: dict[tuple[str, str], Callable[[Folders, Path], None]] = {
    ("fedavg", "rotation"): fedavg_moves_with_a_rotation,
    ("fedavg", "exact"): fedavg_is_not_the_mean,
    ("fedavg", "absent"): fedavg_is_not_the_mean_where_a_client_lacks_a_module,
    ("ffa", "rotation"): ffa_refuses_a_rotated_client,
    ("svd", "identity"): svd_loses_what_a_client_has_above_the_rank,
    ("svd", "exact"): svd_is_not_the_mean,
    **{(method, "identity"): a_client_alone_loses_entries(method) for method in ("ties", "dare")},
    **{(method, "exact"): is_not_the_mean(method) for method in ("ties", "dare")},
    **{(method, "absent"): is_not_the_mean_where_a_client_lacks_a_module(method) for method in ("ties", "dare")},
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda pair: f"{pair[0]} breaks {pair[1]}")
def test_a_law_that_is_not_declared_is_really_broken(broken: tuple[str, str], plain: Folders, tmp_path: Path) -> None:
    BROKEN[broken](plain, tmp_path)
