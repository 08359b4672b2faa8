"""Tiny random base models, one for each family of layers that PEFT adapts; every call gives the same weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCAB = 40
WIDTH = 16


def llama() -> nn.Module:
    """A two-layer Llama with an untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        attention_bias=True,
    )
    return seeded(lambda: LlamaForCausalLM(config))


def classifier() -> nn.Module:
    """A one-layer Llama with a head of five classes."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        num_labels=5,
        pad_token_id=0,
    )
    return seeded(lambda: LlamaForSequenceClassification(config))


def gpt2() -> nn.Module:
    """A two-layer GPT-2: Conv1D layers, and lm_head tied to wte, as in the real one."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=WIDTH, n_layer=2, n_head=2)
    return seeded(lambda: GPT2LMHeadModel(config))


def phi() -> nn.Module:
    """A one-layer Phi, whose head has a bias."""
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return seeded(lambda: PhiForCausalLM(config))


def gptj() -> nn.Module:
    """A one-layer GPT-J: a head with a bias, as Phi's, and an embedding by another name."""
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(
        vocab_size=VOCAB,
        n_positions=32,
        n_embd=WIDTH,
        n_layer=1,
        n_head=2,
        rotary_dim=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    return seeded(lambda: GPTJForCausalLM(config))


def mixtral() -> nn.Module:
    """A one-layer Mixtral with three experts, whose weights are two stacked 3-D parameters."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    return seeded(lambda: MixtralForCausalLM(config))


class Convolutions(nn.Module):
    """Every convolution: 3x3, 1x1, strided, grouped, one- and three-dimensional, and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Conv2d(3, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 6, 1, bias=False)
        self.grouped = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
        self.line = nn.Conv1d(8, 10, 3, padding=1)
        self.cube = nn.Conv3d(1, 4, (1, 1, 3), padding=(0, 0, 1))
        self.classifier = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:  # x: (batch, 3, 8, 8)
        x = torch.tanh(self.square(x))
        x = torch.tanh(self.point(x))
        x = torch.tanh(self.grouped(x))  # (batch, 8, 4, 4)
        x = torch.tanh(self.line(x.flatten(2)))  # (batch, 10, 16)
        x = self.cube(x.reshape(-1, 1, 10, 4, 4)).mean(dim=(1, 3, 4))  # (batch, 10)
        return self.classifier(torch.tanh(x))


class Experts(nn.Module):
    """Bare parameters: a stack of experts (experts, out, in), another kept transposed, and a plain matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 12, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(3, WIDTH, 12) / 4)
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:  # x: (batch, WIDTH)
        up = torch.tanh(torch.einsum("bi,eoi->beo", x, self.up))
        return torch.einsum("beo,eio->bi", up, self.down) @ self.mix.T


class Attention(nn.Module):
    """torch's own MultiheadAttention, which PEFT adapts through in_proj and out_proj at once."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:  # x: (batch, length, WIDTH)
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Mixed(nn.Module):
    """Conv1Ds beside all that PEFT does not tell from it by its flag, and two names of which one differs by a dot."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.square = Conv1D(WIDTH, WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.up = Conv1D(24, WIDTH)
        self.experts = Experts()
        self.a_b = nn.Linear(24, WIDTH)
        self.a = nn.ModuleDict({"b": nn.Linear(WIDTH, WIDTH)})
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:  # x: (batch, length, WIDTH)
        x = self.attention(x, x, x, need_weights=False)[0].flatten(0, 1)
        x = torch.tanh(self.linear(torch.tanh(self.square(x))))
        return self.head(torch.tanh(self.a["b"](torch.tanh(self.a_b(torch.tanh(self.up(self.experts(x))))))))


class Nested(nn.Module):
    """A module called proj, and another whose name ends in it."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.block = nn.ModuleDict({"proj": nn.Linear(WIDTH, WIDTH), "last": nn.Linear(WIDTH, 5)})

    def forward(self, x: Tensor) -> Tensor:  # x: (batch, WIDTH)
        return self.block["last"](torch.tanh(self.block["proj"](torch.tanh(self.proj(x)))))


class Wrapped(nn.Module):
    """Experts inside a model, so that `target_parameters` has a module path to name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.experts = Experts()
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.silu(self.experts(self.body(x))))


def convolutions() -> nn.Module:
    return seeded(Convolutions)


def experts() -> nn.Module:
    return seeded(Wrapped)


def attention() -> nn.Module:
    return seeded(Attention)


def mixed() -> nn.Module:
    return seeded(Mixed)


def nested() -> nn.Module:
    return seeded(Nested)


def seeded(build: Any) -> nn.Module:
    """Build a model under a fixed seed, with every vector (biases and norms) random too; evaluation mode, fp32."""
    with torch.random.fork_rng():
        torch.manual_seed(20)
        model: nn.Module = build().eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data = 1 + 0.1 * torch.randn_like(parameter)
            else:
                parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    return model


def token_ids() -> Tensor:
    """(4, 9) token ids that cover the rows 0 to VOCAB."""
    return torch.arange(36).reshape(4, 9)


def logits(model: nn.Module) -> Tensor:
    """The model's output on fixed inputs, in the model's own type; the judge of every equality."""
    generator = torch.Generator().manual_seed(7)
    dtype = next(model.parameters()).dtype
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        if hasattr(base, "config"):
            return model(input_ids=token_ids()).logits
        shapes = {Convolutions: (4, 3, 8, 8), Attention: (4, 6, WIDTH), Mixed: (4, 6, WIDTH)}
        return model(torch.randn(shapes.get(type(base), (16, WIDTH)), generator=generator).to(dtype))


def save_base(model: nn.Module, folder: Path) -> Path:
    """Write a base model the way its users keep it: a folder with its safetensors (and config, where it has one)."""
    from safetensors.torch import save_model

    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        folder.mkdir(parents=True)
        save_model(model, str(folder / "model.safetensors"))
    return folder
