"""lora_A starts from the same bytes wherever it is drawn, and the model is unchanged by it."""

import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from lora_merge.training.lora_start import seeded_uniform, start_from_seed

DIGEST = """
import hashlib, torch
from lora_merge.training.lora_start import seeded_uniform
values = seeded_uniform(7, "model.layers.0.mlp.up_proj", (16, 20000), 0.25)
print(torch.get_num_threads(), hashlib.sha256(values.numpy().tobytes()).hexdigest())
"""


class Two(nn.Module):
    """An embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 64)
        self.out = nn.Linear(64, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.words(ids))  # type: ignore[no-any-return]


def adapted(seed: int, **config: object) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(Two(), LoraConfig(r=8, target_modules=["words", "out"], **config))  # type: ignore[arg-type]
    assert start_from_seed(model, seed) == 2
    return model


def test_separate_processes_with_other_thread_counts_draw_the_same_bytes() -> None:
    outputs = []
    for threads in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        run = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, check=True, capture_output=True, text=True
        )
        outputs.append(run.stdout.split())
    assert [threads for threads, _ in outputs] == ["1", "2"]
    assert outputs[0][1] == outputs[1][1]


def test_the_bytes_are_those_that_every_release_has_drawn() -> None:
    values = seeded_uniform(7, "model.layers.0.self_attn.q_proj", (4, 8), 0.25)
    digest = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    assert digest == "8eb525ae2652965576761f7ff9c90935da652732badef7cce4a19d0ab035ff70"


def test_values_are_uniform_within_the_bound() -> None:
    values = seeded_uniform(1, "layer", (64, 512), 0.25)
    assert values.dtype == torch.float32
    assert -0.25 <= values.min() < -0.2499
    assert 0.2499 < values.max() < 0.25
    assert abs(values.mean()) < 0.005
    assert values.std() == pytest.approx(0.5 / math.sqrt(12), rel=0.02)


def test_other_seeds_and_other_names_draw_other_values() -> None:
    first = seeded_uniform(1, "layer", (4, 8), 1.0)
    assert not torch.equal(first, seeded_uniform(2, "layer", (4, 8), 1.0))
    assert not torch.equal(first, seeded_uniform(1, "other", (4, 8), 1.0))
    assert torch.equal(first, seeded_uniform(1, "layer", (4, 8), 1.0))


def test_a_linear_layer_starts_as_peft_draws_it_and_lora_B_at_zero() -> None:
    model = adapted(3)
    layer = model.get_submodule("base_model.model.out")
    factor = layer.lora_A["default"].weight  # type: ignore[union-attr, index]
    assert torch.equal(factor, seeded_uniform(3, "out", (8, 64), 1 / 8))
    assert not layer.lora_B["default"].weight.any()  # type: ignore[union-attr, index]


def test_an_embedding_starts_the_other_way_round_with_unit_variance() -> None:
    model = adapted(3)
    layer = model.get_submodule("base_model.model.words")
    assert not layer.lora_embedding_A["default"].any()  # type: ignore[union-attr, index]
    drawn = layer.lora_embedding_B["default"]  # type: ignore[union-attr, index]
    assert torch.equal(drawn, seeded_uniform(3, "words", (64, 8), math.sqrt(3)))
    assert drawn.std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_the_start_leaves_the_model_as_it_was(config: dict[str, object]) -> None:
    model = adapted(3, **config)
    ids = torch.tensor([[1, 2, 3]])
    torch.manual_seed(0)
    assert torch.allclose(model(ids), Two()(ids), atol=1e-6)


def test_the_generator_of_the_process_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    seeded_uniform(1, "layer", (4, 8), 1.0)
    assert torch.equal(torch.rand(3), expected)
