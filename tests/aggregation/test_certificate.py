"""The certificate says how far the written adapter is from the mean: the same number that whole matrices give."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_merge import aggregate
from lora_merge.errors import RefusedError
from tests.adapters import KINDS, PLAIN, Kind, edited
from tests.conftest import Federations
from tests.dense import base_weights, delta_weights, mean_deltas

Folders = tuple[Path, ...]
DIGITS = 6e-3  # the certificate is written with three digits


def certificate(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "aggregation.json").read_text())["certificate"])


def dense_errors(kind: Kind, out: Path, folders: Folders) -> tuple[float, dict[str, float]]:
    """|written - M| / |M| over everything, and by tensor, from whole matrices."""
    wanted, got = mean_deltas(kind, folders), delta_weights(kind, out)
    names = sorted(wanted.keys() | got.keys())
    zero = torch.zeros(1)
    errors = {name: float((got.get(name, zero) - wanted.get(name, zero)).norm()) for name in names}
    norms = {name: float(wanted.get(name, zero).norm()) for name in names}
    return rooted(errors) / rooted(norms), {name: errors[name] / norms[name] for name in names if norms[name]}


def rooted(values: dict[str, float]) -> float:
    return sum(value**2 for value in values.values()) ** 0.5


@pytest.mark.parametrize(
    ("method", "options"), [("fedavg", {}), ("svd", {"rank": 3}), ("svd", {"rank": "auto", "energy": 0.8})]
)
def test_it_is_the_dense_error_as_a_whole_and_by_module(
    method: str, options: dict[str, Any], plain: Folders, tmp_path: Path
) -> None:
    aggregate(plain, tmp_path / "global", method=method, **options)
    whole, by_tensor = dense_errors(PLAIN, tmp_path / "global", plain)
    said = certificate(tmp_path / "global")
    assert said["measured_by"] == "exact"
    assert said["whole"] == {"relative_error": pytest.approx(whole, rel=DIGITS)}
    assert {f"{name}.weight": part["relative_error"] for name, part in said["modules"].items()} == {
        name: pytest.approx(error, rel=DIGITS) for name, error in by_tensor.items()
    }


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.by_layer], ids=lambda kind: kind.name)
def test_it_is_the_dense_error_for_every_kind(kind: Kind, federations: Federations, tmp_path: Path) -> None:
    made = federations(kind)
    aggregate(made.clients, tmp_path / "global", method="svd", rank=2, base=made.base)
    said = certificate(tmp_path / "global")
    assert said["not_measured"] == []
    whole, _ = dense_errors(kind, tmp_path / "global", made.clients)
    assert said["whole"]["relative_error"] == pytest.approx(whole, rel=DIGITS, abs=1e-7)


@pytest.mark.parametrize("times", [-0.9, 1.0])
def test_a_bias_that_was_trained_whole_and_by_lora_bias_is_one_bias(
    times: float, federations: Federations, tmp_path: Path
) -> None:
    kind = next(kind for kind in KINDS if kind.name == "lora_bias beside trained biases")
    made, base = federations(kind), base_weights(kind.build)

    def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A large lora_bias, and the bias itself moved by `times` as much."""
        found = {name: value * 30 if name.endswith("lora_B.bias") else value for name, value in tensors.items()}
        for name, value in found.items():
            if name.endswith("lora_B.bias"):
                bias = name.removeprefix("base_model.model.").replace("lora_B.bias", "bias")
                own = name.replace("lora_B.bias", "base_layer.bias")
                found = {**found, own: (base[bias] + times * 2 * value).float()}
        return found

    clients = (edited(made.clients[0], tmp_path / "client-0", tensors=moved), *made.clients[1:])
    aggregate(clients, tmp_path / "global", method="svd", rank=1, base=made.base, screening=None)
    whole, _ = dense_errors(kind, tmp_path / "global", clients)
    assert certificate(tmp_path / "global")["whole"]["relative_error"] == pytest.approx(whole, rel=DIGITS)


@pytest.mark.parametrize("method", ["fedavg", "ffa"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.by_layer], ids=lambda kind: kind.name)
def test_a_method_that_is_no_mean_states_the_dense_error_or_refuses_the_kind(
    method: str, kind: Kind, federations: Federations, tmp_path: Path
) -> None:
    made = federations(kind)
    refusal = None
    try:
        aggregate(made.clients, tmp_path / "global", method=method, base=made.base)
    except RefusedError as refused:
        refusal = refused
    if refusal:
        assert all(method in problem.reason for problem in refusal.problems)
        assert list(tmp_path.iterdir()) == []
    else:
        whole, _ = dense_errors(kind, tmp_path / "global", made.clients)
        assert certificate(tmp_path / "global")["whole"]["relative_error"] == pytest.approx(whole, rel=DIGITS, abs=1e-7)


@pytest.mark.parametrize("method", ["fedavg", "ffa"])
@pytest.mark.parametrize("name", ["rslora", "DoRA", "DoRA and plain LoRA"])
def test_averaging_the_factors_refuses_different_ranks_and_dora(
    name: str, method: str, federations: Federations, tmp_path: Path
) -> None:
    made = federations(next(kind for kind in KINDS if kind.name == name))
    with pytest.raises(RefusedError):
        aggregate(made.clients, tmp_path / "global", method=method, base=made.base)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_exact_is_exact_to_the_last_digits_of_fp32(kind: Kind, federations: Federations, tmp_path: Path) -> None:
    made = federations(kind)
    aggregate(made.clients, tmp_path / "global", base=made.base_argument)
    assert certificate(tmp_path / "global")["whole"]["relative_error"] < 3e-7


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_it_measures_the_tensors_as_they_were_written(dtype: str, plain: Folders, tmp_path: Path) -> None:
    aggregate(plain, tmp_path / "global", dtype=dtype)
    whole, _ = dense_errors(PLAIN, tmp_path / "global", plain)
    assert whole > 1e-4
    assert certificate(tmp_path / "global")["whole"]["relative_error"] == pytest.approx(whole, rel=DIGITS)


def test_probes_estimate_it_within_their_standard_error(plain: Folders, tmp_path: Path) -> None:
    aggregate(plain, tmp_path / "global", method="svd", rank=3, certificate="probes")
    whole, by_tensor = dense_errors(PLAIN, tmp_path / "global", plain)
    said = certificate(tmp_path / "global")
    assert said["measured_by"] == "probes"
    assert 0 < said["whole"]["standard_error"] < 0.1 * whole
    assert abs(said["whole"]["relative_error"] - whole) < 4 * said["whole"]["standard_error"]
    for name, part in said["modules"].items():
        assert abs(part["relative_error"] - by_tensor[f"{name}.weight"]) < 5 * part["standard_error"]


def test_off_measures_nothing_and_says_so(plain: Folders, tmp_path: Path) -> None:
    aggregate(plain, tmp_path / "global", method="fedavg", certificate="off")
    said = certificate(tmp_path / "global")
    assert (said["measured_by"], said["whole"], said["modules"]) == ("off", None, {})
    assert "not measured" in (tmp_path / "global" / "README.md").read_text()


def test_the_bytes_of_the_weights_do_not_depend_on_how_they_were_measured(plain: Folders, tmp_path: Path) -> None:
    written = set()
    for how in ("exact", "probes", "off"):
        aggregate(plain, tmp_path / how, method="svd", rank=3, certificate=how)
        written.add((tmp_path / how / "adapter_model.safetensors").read_bytes())
    assert len(written) == 1


def test_exact_says_what_fedavg_would_have_missed(plain: Folders, tmp_path: Path) -> None:
    aggregate(plain, tmp_path / "exact")
    aggregate(plain, tmp_path / "fedavg", method="fedavg")
    missed, _ = dense_errors(PLAIN, tmp_path / "fedavg", plain)
    said = certificate(tmp_path / "exact")["fedavg_would_miss"]
    assert missed > 0.3
    assert abs(said["relative_error"] - missed) < 4 * said["standard_error"]
    assert "lora_A and lora_B apart" in (tmp_path / "exact" / "README.md").read_text()


def test_clients_that_share_lora_a_would_have_missed_nothing(plain: Folders, tmp_path: Path) -> None:
    copies = [edited(plain[0], tmp_path / f"copy-{i}") for i in range(2)]
    aggregate(copies, tmp_path / "global")
    assert certificate(tmp_path / "global")["fedavg_would_miss"]["relative_error"] < 1e-6


def test_above_a_stack_of_1024_it_is_estimated(tmp_path: Path) -> None:
    folders = [wide_client(tmp_path / f"client-{i}", seed=i) for i in range(3)]  # K = 1050
    aggregate(folders, tmp_path / "global", method="svd", rank=8, weights="uniform")
    said = certificate(tmp_path / "global")
    assert said["measured_by"] == "probes"
    assert "an estimate" in (tmp_path / "global" / "README.md").read_text()
    assert 0.9 < said["whole"]["relative_error"] < 1.0


def wide_client(folder: Path, seed: int) -> Path:
    """One 400 x 500 module of rank 350."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator)

    folder.mkdir()
    name = "base_model.model.layers.0.proj"
    tensors = {f"{name}.lora_A.weight": random(350, 500), f"{name}.lora_B.weight": random(400, 350)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 350, "lora_alpha": 350, "target_modules": ["proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
