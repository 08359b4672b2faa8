"""Whether clients' updates can be averaged, by their shapes and names alone."""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from lora_merge.adapter import Client, FactorsSpec, Spec, Update
from lora_merge.aggregation.compatibility import shape_problems

MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")


@dataclass(frozen=True)
class Shapes:
    """An adapter of which nothing is read but its shapes."""

    specs: Mapping[str, Spec]

    def __getitem__(self, module: str) -> Update:
        raise AssertionError(module)


def client(name: str, path: str, *, modules: tuple[str, ...] = MODULES, width: int = 8) -> Client:
    spec = FactorsSpec("linear", 1, width, width, 2, 1.0, False, False, ())
    names = [f"{path}layers.{layer}.{module}" for layer in range(2) for module in modules]
    return Client(name, 1.0, Shapes(dict.fromkeys(names, spec)))


RENAMED = [
    ("model.language_model.", "language_model.model."),  # transformers 4.52
    ("model.language_model.", "model."),
    ("model.", ""),  # a model with its head, and without
    ("bert.encoder.", "encoder."),
]


@pytest.mark.parametrize("paths", [*RENAMED, *(pair[::-1] for pair in RENAMED)])
@pytest.mark.parametrize("modules", [MODULES, MODULES[1:], (*MODULES, "mlp.down_proj")])
def test_who_has_the_others_modules_under_another_name_is_refused(
    paths: tuple[str, str], modules: tuple[str, ...]
) -> None:
    two = [client("a", paths[0]), client("b", paths[0], modules=modules[:2])]
    (problem,) = shape_problems([*two, client("odd", paths[1], modules=modules)])
    assert problem.client == "odd"
    assert problem.field.startswith(f"{paths[1]}layers.0.")
    assert problem.field.replace(paths[1], paths[0], 1) in problem.reason


@pytest.mark.parametrize(
    "others",
    [
        [client("b", "model.decoder.")],  # the other half of one model
        [client("b", "model.encoder.", modules=("mlp.down_proj",))],  # other modules of it
        [client("b", "model.encoder.", modules=("mlp.down_proj",)), client("c", "model.encoder.")],
        [client("b", "model.", width=6)],  # of another size: no other name of these
        [client("b", "vision_tower.vision_model.")],
    ],
)
def test_who_trained_other_modules_is_not(others: list[Client]) -> None:
    assert shape_problems([client("a", "model.encoder."), *others]) == []


def test_half_that_trained_both_names_makes_them_two_modules() -> None:
    both = Client("both", 1.0, Shapes({**client("a", "model.").adapter.specs, **client("b", "").adapter.specs}))
    assert shape_problems([both, client("c", "")]) == []
