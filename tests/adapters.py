"""Tiny adapters of every kind, made and saved by PEFT itself, with random weights where training would have put some.

A `Kind` is one way of fine-tuning a tiny base, and the clients that did it; `KINDS` holds them all. What PEFT writes
for each kind, where it surprises, is said beside the kind.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_merge.statement import FILE_NAME as STATEMENT
from lora_merge.statement import BaseModel, Statement
from tests import models

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Client:
    """One client's fine-tuning: the arguments of its LoraConfig, its storage type and what it states."""

    lora: Mapping[str, Any]
    dtype: torch.dtype = torch.float32
    num_examples: int = 10


@dataclass(frozen=True)
class Kind:
    """A kind of adapter.

    Attributes:
        build: makes the base model.
        clients: who fine-tuned it, and how.
        needs_base: whether the exact mean needs tensors of the base.
        by_layer: judge by the mean of each layer's output, where PEFT cannot merge the weights themselves.
    """

    name: str
    build: Callable[[], nn.Module]
    clients: tuple[Client, ...]
    needs_base: bool = False
    by_layer: bool = False

    @property
    def by_coordinate(self) -> bool:
        """Whether a rule can act on the entries of its updates: magnitudes, and biases in two parts, have none."""
        return "DoRA" not in self.name and self.name != "lora_bias beside trained biases"

    @property
    def weights(self) -> list[float]:
        """p_i of the clients, by their examples."""
        counts = [client.num_examples for client in self.clients]
        return [count / sum(counts) for count in counts]


@dataclass(frozen=True)
class Federation:
    """The folders of one kind's clients, and of their base."""

    kind: Kind
    base: Path
    clients: tuple[Path, ...]

    @property
    def base_argument(self) -> Path | None:
        """The base's folder where the kind needs it, else None: nothing else may be read."""
        return self.base if self.kind.needs_base else None


def adapter(base: nn.Module, client: Client, seed: int) -> Any:
    """`base` with a PEFT adapter whose every trainable tensor has moved; in the client's storage type."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # PEFT comments on grouped convolutions, tied embeddings, unknown bases
        torch.manual_seed(seed)
        lora = {"r": 4, "lora_alpha": 8, **client.lora}
        model = get_peft_model(base, LoraConfig(**lora)).eval()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                move(name, parameter)
                parameter.data = parameter.data.to(client.dtype)
    return model


def move(name: str, parameter: nn.Parameter) -> None:
    """Stand in for training: full tensors and magnitudes shift a little, LoRA factors become random."""
    if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
        parameter.data = 0.3 * torch.randn_like(parameter)
    else:
        parameter.data = parameter.data * (1 + 0.2 * torch.rand_like(parameter)) + 0.05 * torch.randn_like(parameter)


def save(model: Any, folder: Path, *, num_examples: int | None = 10, client_id: str | None = None) -> Path:
    """Write the adapter as PEFT does, with a statement beside it unless `num_examples` is None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    if num_examples is not None:
        statement = Statement(
            client_id=client_id or f"org/{folder.name}",
            base_model=BaseModel(repo="org/tiny"),
            num_examples=num_examples,
        )
        (folder / STATEMENT).write_text(statement.to_json())
    return folder


def federation(kind: Kind, root: Path) -> Federation:
    """Build and write the base and every client of `kind` under `root`."""
    base = models.save_base(kind.build(), root / "base")
    folders = tuple(
        save(adapter(kind.build(), client, seed), root / f"client-{seed}", num_examples=client.num_examples)
        for seed, client in enumerate(kind.clients)
    )
    return Federation(kind, base, folders)


def clients(*loras: Mapping[str, Any], common: Mapping[str, Any] | None = None) -> tuple[Client, ...]:
    """A client for each LoraConfig, with 10, 20, 30 … examples."""
    return tuple(Client({**(common or {}), **lora}, num_examples=10 * (i + 1)) for i, lora in enumerate(loras))


ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
CAUSAL = {"task_type": "CAUSAL_LM"}
CONVOLUTIONS = {"target_modules": ["square", "point", "grouped", "line", "cube", "classifier"]}
UNGROUPED = {"target_modules": ["square", "point", "line", "cube"]}
BOTH_EXPERTS = ["experts.up", "experts.down"]

PLAIN = Kind("linear", models.llama, clients(ATTENTION, ATTENTION, ATTENTION, common=CAUSAL))

KINDS: Sequence[Kind] = (
    PLAIN,
    Kind("rslora", models.llama, clients({"use_rslora": True, "r": 9}, {"use_rslora": True}, {}, common=ATTENTION)),
    Kind(
        "rank and alpha patterns",
        models.llama,
        clients(
            {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 3}},
            {"alpha_pattern": {"layers.0.self_attn.q_proj": 3, "v_proj": 20}, "use_rslora": True},
            {"rank_pattern": {"v_proj": 6}, "alpha_pattern": {"v_proj": 5}},
            common=ATTENTION,
        ),
    ),
    Kind(
        "ranks, scalings, modules and float types of each client's own",
        models.llama,
        (
            Client({"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "o_proj"]}, torch.bfloat16, 10),
            Client({"r": 5, "lora_alpha": 1, "target_modules": "all-linear"}, torch.float16, 20),
            Client({"r": 3, "target_modules": r".*layers\.1\..*(gate|up|down)_proj"}, torch.float32, 5),
            Client({"target_modules": ["v_proj", "down_proj"], "layers_to_transform": [0]}, num_examples=7),
        ),
    ),
    Kind(
        "Conv1D",
        models.gpt2,
        clients(
            {"target_modules": ["c_attn"]},
            {"target_modules": ["c_attn", "c_proj"], "r": 3},
            {"target_modules": ["mlp.c_proj", "c_fc"], "r": 2},
            common={"fan_in_fan_out": True, **CAUSAL},
        ),
    ),
    # embed_tokens and lm_head, when targeted by name, are saved whole beside their LoRA, as X.base_layer.weight.
    Kind(
        "embedding",
        models.llama,
        clients({}, {"r": 3}, common={"target_modules": ["embed_tokens", "lm_head"], **CAUSAL}),
    ),
    Kind(
        "embedding that some lack",
        models.llama,
        clients({"target_modules": ["embed_tokens", "lm_head"]}, {"target_modules": ["embed_tokens"]}, ATTENTION),
        needs_base=True,  # to see that what some saved along is what the others have
    ),
    # A head's bias is saved along with its weight, as X.base_layer.bias.
    Kind(
        "head with a bias",
        models.phi,
        clients({}, {"r": 3}, common={"target_modules": ["lm_head", "q_proj"], **CAUSAL}),
    ),
    Kind(
        "head with a bias that some lack",
        models.gptj,
        clients({"target_modules": ["lm_head", "wte"]}, {"target_modules": ["lm_head"], "r": 3}, ATTENTION),
        needs_base=True,
    ),
    # With bias="all" or "lora_only" it has the same name, and was trained.
    Kind(
        "head whose bias some trained",
        models.phi,
        clients(
            {"target_modules": ["lm_head", "q_proj"]},
            {"target_modules": ["lm_head"], "bias": "lora_only"},
            {"target_modules": ["lm_head", "dense"], "r": 2, "bias": "all"},
        ),
        needs_base=True,
    ),
    # GPT-2's wte is not a name that PEFT knows as an embedding: no base_layer.weight; its tied head does not move.
    Kind(
        "tied embedding",
        models.gpt2,
        clients({"target_modules": ["wte"]}, {"target_modules": ["wte", "wpe"], "r": 3}, common=CAUSAL),
        by_layer=True,
    ),
    # lora_A has every input channel, and only lora_B is grouped: B is (out, r / groups, 1, 1), and output group g
    # reads the rank channels [g r / groups, (g + 1) r / groups).
    # PEFT cannot merge the weights of grouped convolutions, nor of Conv3d kernels of (1, 1, k).
    Kind("convolutions", models.convolutions, clients({}, {"r": 2}, {"r": 6}, common=CONVOLUTIONS), by_layer=True),
    # The bias, too, is multiplied by the scaling.
    Kind(
        "lora_bias",
        models.llama,
        clients({"lora_bias": True}, {"lora_bias": True, "r": 3}, {"lora_alpha": 2}, common=ATTENTION),
    ),
    Kind(
        "lora_bias of convolutions",
        models.convolutions,
        clients(
            {"lora_bias": True}, {"lora_bias": True, "r": 2}, common={"target_modules": ["square", "grouped", "line"]}
        ),
        by_layer=True,
    ),
    # bias="all" saves every bias whole: as X.base_layer.bias where X has LoRA, as X.bias where it has not.
    Kind(
        "bias all",
        models.llama,
        clients({"target_modules": ["q_proj"]}, {"target_modules": ["k_proj"]}, common={"bias": "all"}),
    ),
    Kind("bias lora_only", models.llama, clients({}, {"r": 2}, common={"bias": "lora_only", **ATTENTION})),
    Kind(
        "bias that some lack",
        models.llama,
        clients(
            {"bias": "lora_only", "target_modules": ["q_proj"]},
            {"bias": "none", "target_modules": ["q_proj"]},
            {"bias": "all", "target_modules": ["v_proj"]},
        ),
        needs_base=True,
    ),
    Kind(
        "lora_bias beside trained biases",
        models.llama,
        clients(
            {"lora_bias": True, "bias": "lora_only"}, {"lora_bias": True, "r": 3}, {"bias": "all"}, {}, common=ATTENTION
        ),
        needs_base=True,
    ),
    Kind(
        "modules_to_save",
        models.llama,
        clients({}, {"r": 2}, common={**ATTENTION, "modules_to_save": ["lm_head", "input_layernorm"]}),
    ),
    # A name in modules_to_save means every module whose name ends in it, dot or no dot: here all the norms.
    Kind(
        "modules_to_save by an ending",
        models.llama,
        clients({"modules_to_save": ["norm"]}, {"modules_to_save": ["input_layernorm"]}, common=ATTENTION),
        needs_base=True,
    ),
    Kind(
        "modules_to_save of a classifier",
        models.convolutions,
        clients(
            {}, {"r": 2}, common={"target_modules": ["square", "point", "line"], "modules_to_save": ["classifier"]}
        ),
    ),
    # PEFT names both "classifier" and "score" in the config of every sequence classifier, which has one of them.
    Kind(
        "sequence classification",
        models.classifier,
        clients({}, {"r": 2}, common={**ATTENTION, "task_type": "SEQ_CLS"}),
    ),
    Kind(
        "modules_to_save that some lack",
        models.llama,
        clients({"modules_to_save": ["lm_head"]}, {}, {"modules_to_save": ["input_layernorm"]}, common=ATTENTION),
        needs_base=True,
    ),
    # lm_head is tied to wte: the base's file holds only transformer.wte.weight.
    Kind(
        "modules_to_save of a tied head that some lack",
        models.gpt2,
        clients({"modules_to_save": ["lm_head"]}, {}, common={"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        needs_base=True,
    ),
    # trainable_tokens_delta holds whole rows, not differences, in the order of the config's list.
    Kind("tokens", models.llama, clients({}, {"r": 2}, common={**ATTENTION, "trainable_token_indices": [1, 5, 7]})),
    Kind(
        "tokens that some lack",
        models.llama,
        clients(
            {"trainable_token_indices": [7, 1, 5]},
            {"trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [9]}},
            {},
            common=ATTENTION,
        ),
        needs_base=True,
    ),
    Kind(
        "tokens of a tied embedding",
        models.gpt2,
        clients(
            {"trainable_token_indices": [3, 8]},
            {"trainable_token_indices": [8]},
            common={"target_modules": ["c_attn"], "fan_in_fan_out": True},
        ),
        needs_base=True,
    ),
    # lora_A of a stack of experts is expert-major, (experts * r, in), and lora_B rank-major, (out, r * experts).
    # The keys name the module, not the parameter: of two parameters the one defined first is the inner one,
    # X.base_layer.lora_A, in whatever order the config names them.
    Kind(
        "experts",
        models.experts,
        clients({}, {"r": 2}, {"r": 3}, common={"target_modules": ["body"], "target_parameters": BOTH_EXPERTS}),
    ),
    Kind(
        "experts of one parameter",
        models.experts,
        clients({"target_parameters": ["experts.down"]}, {"target_parameters": ["experts.down"], "r": 3}),
    ),
    Kind(
        "experts that some lack",
        models.experts,
        clients(
            {"target_parameters": BOTH_EXPERTS},
            {"target_modules": ["body", "head"], "r": 2},
            {"target_parameters": BOTH_EXPERTS, "r": 2},
        ),
    ),
    Kind(
        "a parameter that is a matrix",
        models.experts,
        clients({}, {"r": 2}, common={"target_parameters": ["experts.mix"]}),
    ),
    Kind(
        "Mixtral",
        models.mixtral,
        clients(
            {},
            {"r": 2},
            common={
                "target_modules": ["q_proj"],
                "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            },
        ),
    ),
    # Both target_modules and the patterns match by suffix, so "proj" alone would catch "block.proj" too.
    Kind("a name that another one ends in", models.nested, clients({}, {"r": 2}, common={"target_modules": r"proj"})),
    Kind(
        "names that end in each other, with ranks and scalings of their own",
        models.nested,
        clients(
            {"target_modules": r"proj", "r": 2},
            {"target_modules": ["block.proj"]},
            {"target_modules": ["proj", "last"]},
        ),
    ),
    # in_proj's LoRA is X.lora_A and out_proj's is X.base_layer.out_proj.lora_A; PEFT makes both from X's r and alpha.
    Kind("MultiheadAttention", models.attention, clients({}, {"r": 2}, common={"target_modules": ["attention"]})),
    Kind("DoRA", models.llama, clients({}, {"r": 2}, common={"use_dora": True, **ATTENTION}), needs_base=True),
    Kind(
        "DoRA and plain LoRA",
        models.llama,
        clients(
            {"use_dora": True, "target_modules": ["q_proj", "o_proj"], "use_rslora": True},
            {"target_modules": ["q_proj", "v_proj"], "r": 3},
            {"use_dora": True, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2}},
        ),
        needs_base=True,
    ),
    Kind(
        "DoRA of Conv1D",
        models.gpt2,
        clients(
            {"use_dora": True},
            {"use_dora": True, "r": 2},
            {},
            common={"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        ),
        needs_base=True,
    ),
    # Its magnitude is one number for each column of the embedding.
    Kind(
        "DoRA of an embedding",
        models.llama,
        clients(
            {"use_dora": True},
            {"r": 2},
            {"use_dora": True, "r": 3},
            common={"target_modules": ["embed_tokens", "q_proj"]},
        ),
        needs_base=True,
    ),
    # Its magnitude is (1, out, 1, 1).
    Kind(
        "DoRA of convolutions",
        models.convolutions,
        clients({"use_dora": True}, {"use_dora": True, "r": 2}, {}, common={**UNGROUPED}),
        needs_base=True,
        by_layer=True,
    ),
)
# What cannot be merged exactly may be refused, never guessed: each of these is either exact or a RefusedError.
EXACT_OR_REFUSED: Sequence[Kind] = (
    # PEFT takes the norm of a grouped convolution from a reshape that mixes its channels.
    Kind(
        "DoRA of a grouped convolution",
        models.convolutions,
        clients({"use_dora": True}, {"use_dora": True, "r": 2}, common={"target_modules": ["grouped"]}),
        needs_base=True,
        by_layer=True,
    ),
    # Nothing in the files says which parameter X.lora_A belongs to.
    Kind(
        "experts of different parameters",
        models.experts,
        clients({"target_parameters": ["experts.down"]}, {"target_parameters": ["experts.up"]}),
    ),
    Kind(
        "experts of one and of both parameters",
        models.experts,
        clients({"target_parameters": BOTH_EXPERTS}, {"target_parameters": ["experts.down"]}),
    ),
    Kind(
        "experts with a rank of each parameter's own",
        models.experts,
        clients(
            {"rank_pattern": {"experts.up": 2}, "alpha_pattern": {"experts.down": 3}},
            {"rank_pattern": {"down": 3}},
            common={"target_parameters": BOTH_EXPERTS},
        ),
    ),
    # PEFT writes into the config whether the last module that it met was a Conv1D, not whether some are.
    Kind(
        "DoRA of a square Conv1D and of a linear head",
        models.gpt2,
        clients({}, {"r": 2}, common={"use_dora": True, "target_modules": ["attn.c_proj", "lm_head"]}),
        needs_base=True,
        by_layer=True,
    ),
    # Where some module is a Conv1D, PEFT turns the update of an attention's out_proj too, and takes no experts.
    Kind(
        "MultiheadAttention and Conv1D",
        models.mixed,
        clients({"target_modules": ["attention"]}, {"target_modules": ["up"], "fan_in_fan_out": True}),
    ),
    Kind(
        "MultiheadAttention and the flag of Conv1D",
        models.mixed,
        clients({"fan_in_fan_out": True}, {}, common={"target_modules": ["attention"]}),
    ),
    Kind(
        "experts and Conv1D",
        models.mixed,
        clients(
            {"target_parameters": ["experts.up"], "target_modules": ["linear"]},
            {"target_modules": ["up"], "fan_in_fan_out": True},
        ),
    ),
    Kind(
        "MultiheadAttention and DoRA",
        models.mixed,
        clients({"target_modules": ["attention"]}, {"target_modules": ["head"], "use_dora": True}),
        needs_base=True,
    ),
    # The bias of an attention's out_proj lies under two wrappers where it has a LoRA, and under none where it has not.
    Kind(
        "a bias of MultiheadAttention that some trained alone",
        models.attention,
        clients(
            {"target_modules": ["attention"], "bias": "lora_only"},
            {"target_modules": ["head"], "bias": "all"},
            {"target_modules": ["head"]},
        ),
        needs_base=True,
    ),
    # A dot in a pattern is any character to PEFT.
    Kind(
        "patterns of names that a dot tells apart",
        models.mixed,
        clients(
            {"r": 3, "alpha_pattern": {"a.b": 2}},
            {"r": 4, "alpha_pattern": {"a.b": 2, "a_b": 5}},
            {"r": 4, "rank_pattern": {"a_b": 3}},
            common={"target_modules": ["a_b", "a.b", "linear"]},
        ),
    ),
    Kind(
        "ranks of names that a dot tells apart",
        models.mixed,
        clients({"r": 3}, {"r": 4, "target_modules": ["a.b"]}, {"r": 3}, common={"target_modules": ["a_b", "linear"]}),
    ),
    Kind(
        "experts trained whole",
        models.mixed,
        clients({"modules_to_save": ["experts"]}, {}, common={"target_modules": ["linear"]}),
        needs_base=True,
    ),
    # The biases of the saved module's wrapper and of its untrained original are in the file too.
    Kind(
        "bias all and a saved module that has one",
        models.experts,
        clients(
            {"modules_to_save": ["head"], "bias": "all"},
            {"modules_to_save": ["head"], "bias": "lora_only"},
            {"bias": "all"},
            common={"target_modules": ["body"]},
        ),
        needs_base=True,
    ),
    Kind(
        "LoRA and a saved copy of one module",
        models.llama,
        clients({"modules_to_save": ["lm_head"], **ATTENTION}, {"target_modules": ["lm_head", "q_proj"]}),
        needs_base=True,
    ),
    Kind(
        "LoRA and token rows of one embedding",
        models.llama,
        clients({"trainable_token_indices": [1, 4], **ATTENTION}, {"target_modules": ["embed_tokens"]}),
        needs_base=True,
    ),
    Kind(
        "a saved embedding and token rows of it",
        models.llama,
        clients({"trainable_token_indices": [1, 4], **ATTENTION}, {"modules_to_save": ["embed_tokens"], **ATTENTION}),
        needs_base=True,
    ),
)


def edited(
    source: Path,
    folder: Path,
    *,
    tensors: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
    config: Mapping[str, Any] | None = None,
    client_id: str | None = None,
) -> Path:
    """A copy of an adapter folder with its tensors passed through `tensors` and its config updated.

    Without `client_id` the copy claims the id `org/<folder's name>`.
    """
    shutil.copytree(source, folder)
    if tensors is not None:
        save_file(tensors(load_file(source / WEIGHTS)), folder / WEIGHTS)
    if config is not None:
        rewrite_json(folder / CONFIG, config)
    if (folder / STATEMENT).exists():
        rewrite_json(folder / STATEMENT, {"client_id": client_id or f"org/{folder.name}"})
    return folder


def rewrite_json(path: Path, changes: Mapping[str, Any]) -> None:
    """Update the entries of a JSON object in place."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
