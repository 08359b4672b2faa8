"""The slow twin: the exact mean of whole models, through PEFT's own forward pass and in fp64.

Nothing here is shared with the package: a client is what PEFT makes of its folder, a merge is judged by what PEFT makes
of the result's folder.
"""

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.adapters import Kind
from tests.models import logits


def base_model(kind: Kind) -> nn.Module:
    """The kind's base in fp64."""
    return base_of(kind.build)


def base_of(build: Callable[[], nn.Module]) -> nn.Module:
    """The base in fp64."""
    model = build().double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product has no fp64
    return model


@cache
def base_weights(build: Callable[[], nn.Module]) -> Mapping[str, Tensor]:
    """The base's tensors in fp64. Read them."""
    return base_of(build).state_dict()


@cache
def base_logits(build: Callable[[], nn.Module]) -> Tensor:
    """The base's answers in fp64. Read them."""
    return logits(base_of(build))


def loaded(kind: Kind, folder: Path) -> Any:
    """The base with the adapter of `folder`, as `PeftModel.from_pretrained` gives it.

    PEFT only warns of a tensor that its config expects and the file lacks, and says nothing of a tensor it did not
    expect; here both are failures.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    file = load_file(folder / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on grouped convolutions, tied embeddings and its own deprecations
        warnings.filterwarnings("error", message="(?s).*missing adapter keys")
        model = PeftModel.from_pretrained(base_model(kind), str(folder)).eval()
        whole_embeddings = any(name.endswith("base_layer.weight") for name in file)
        taken = get_peft_model_state_dict(model, save_embedding_layers=whole_embeddings)
    # A Mixtral adapter of transformers 4 is fused as it is loaded, into tensors of other names.
    ignored = {name for name in set(file) - set(taken) if ".block_sparse_moe." not in name}
    assert not ignored, f"PEFT ignored {sorted(ignored)}"
    return model


def mean_model(kind: Kind, folders: Sequence[Path], weights: Sequence[float], global_lr: float = 1.0) -> nn.Module:
    """W0 + global_lr * sum p_i (W_i - W0) as a dense model, from PEFT's view of each client."""
    scaled = [global_lr * weight for weight in weights]
    return mean_of_layers(kind, folders, scaled) if kind.by_layer else mean_of_weights(kind, folders, scaled)


def mean_of_weights(kind: Kind, folders: Sequence[Path], scaled: Sequence[float]) -> nn.Module:
    """The mean of the models with their adapters merged into their weights."""
    model = untied(base_model(kind))
    start = base_weights(kind.build)
    total = {name: tensor.clone() for name, tensor in start.items()}
    for folder, weight in zip(folders, scaled, strict=True):
        for name, tensor in merged_weights(kind, folder).items():
            total[name] += weight * (tensor - start[name])
    model.load_state_dict(total)
    return model


MERGED: dict[tuple[object, ...], Mapping[str, Tensor]] = {}


def merged_weights(kind: Kind, folder: Path) -> Mapping[str, Tensor]:
    """The tensors of the base with the adapter of `folder` merged in by PEFT, once for each content. Read them."""
    files = ("adapter_config.json", "adapter_model.safetensors")
    key = (kind.build, *(hashlib.sha256((folder / name).read_bytes()).digest() for name in files))
    if key not in MERGED:
        model = loaded(kind, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # says that a tied head no longer is
            MERGED[key] = dict(model.merge_and_unload().state_dict())
    return MERGED[key]


def untied(model: nn.Module) -> nn.Module:
    """`model` with a head of its own where it shared its embedding's weights."""
    head = getattr(model, "lm_head", None)
    if head is not None:
        head.weight = nn.Parameter(head.weight.detach().clone())
    return model


class MeanLayer(nn.Module):
    """f(x) + sum w_i (f_i(x) - f(x)): the mean of one layer over clients, for whatever is linear in its weights."""

    def __init__(self, base: nn.Module, layers: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        self.base = base
        self.layers = nn.ModuleList(layers)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        start = self.base(x)
        return start + sum(w * (layer(x) - start) for layer, w in zip(self.layers, self.weights, strict=True))


def mean_of_layers(kind: Kind, folders: Sequence[Path], scaled: Sequence[float]) -> nn.Module:
    """The base, where each adapted layer answers with the mean of the clients' layers; an absent one counts as base."""
    from peft.tuners.lora import LoraLayer

    model = untied(base_model(kind))
    adapted: dict[str, list[tuple[nn.Module, float]]] = {}
    for folder, weight in zip(folders, scaled, strict=True):
        for name, layer in loaded(kind, folder).get_base_model().named_modules():
            if isinstance(layer, LoraLayer):
                adapted.setdefault(name, []).append((layer, weight))
    for name, entries in adapted.items():
        parent, _, leaf = name.rpartition(".")
        layer = MeanLayer(model.get_submodule(name), [e[0] for e in entries], [e[1] for e in entries])
        setattr(model.get_submodule(parent), leaf, layer)
    return model


def error(kind: Kind, merged: Path, dense: nn.Module) -> float:
    """How far the merged adapter's answers are from the dense model's, relative to what the update changed."""
    wanted, start = logits(dense), base_logits(kind.build)
    got = logits(loaded(kind, merged))
    return relative(got - wanted, wanted - start)


def relative(difference: Tensor, reference: Tensor) -> float:
    """norm(difference) / norm(reference)."""
    return float(difference.double().norm() / reference.double().norm())


def delta_weights(kind: Kind, folder: Path) -> dict[str, Tensor]:
    """W_i - W0 of every tensor that `folder` moves, by its name in the base."""
    start, moved = base_weights(kind.build), merged_weights(kind, folder)
    return {name: moved[name] - start[name] for name in start if not torch.equal(moved[name], start[name])}


def distance_from_mean(kind: Kind, folders: Sequence[Path], merged: Path) -> float:
    """How far `merged` is from the mean of the clients' updates, relative to that."""
    mean, got = mean_deltas(kind, folders), delta_weights(kind, merged)
    apart = sum(float((got.get(each, 0.0) - mean[each]).double().square().sum()) for each in mean)
    size = sum(float(each.double().square().sum()) for each in mean.values())
    return (apart / size) ** 0.5


def mean_deltas(kind: Kind, folders: Sequence[Path]) -> dict[str, Tensor]:
    """sum p_i (W_i - W0) of every tensor that some client moves, p_i by the kind's examples."""
    deltas = [delta_weights(kind, folder) for folder in folders]
    names = sorted({name for delta in deltas for name in delta})
    terms = {name: [p * d[name] for p, d in zip(kind.weights, deltas, strict=True) if name in d] for name in names}
    return {name: torch.stack(parts).sum(dim=0) for name, parts in terms.items()}
