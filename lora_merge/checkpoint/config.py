"""adapter_config.json by our own schema: what changes a merge is read, what changes the base is refused.

PEFT is never handed a config that was not accepted here. Module names come from the tensor keys and ranks from the
shapes; a client's `target_modules` is never evaluated.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lora_merge.aggregation.weights import LARGEST
from lora_merge.checkpoint.naming import Endings, Pattern, Suffixes
from lora_merge.checkpoint.safetensors_file import FileRefused

MAX_R = 1024  # of a client
MAX_SCALING = 1e3
MAX_GLOBAL_R = 1 << 17  # that a config may name; how wide a merged adapter may be goes by its modules
MAX_GLOBAL_SCALING = LARGEST**2  # alpha over the sum of the weights, both of which have that range
MAX_ALIKE = 1000  # keys of a pattern that differ by where their dots are
MAX_CONFIG_BYTES = 1 << 20

# Fields that say which modules to train, or how, and nothing about the numbers that came out; PEFT writes
# `megatron_core` always, and `auto_mapping` where there is no task type. The settings of a start stay in the config of
# an adapter that PEFT has made plain, and mean nothing beside a plain `init_lora_weights`.
_IGNORED = {
    *("auto_mapping", "corda_config", "eva_config", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "target_modules"),
}
_REFUSED = {
    "alora_invocation_tokens": "aLoRA acts on some tokens only, so it has no mean update",
    "arrow_config": "Arrow routes between adapters, so it has no mean update",
    "enable_lora": "PEFT has no MergedLinear any more, whose lora_B left out a part of its module",
    "ensure_weight_tying": "tied adapters are stored once and would be counted as one module",
    "kasa_config": "KaSA changes the base weights",
    "layer_replication": "replicated layers are another base model",
    "megatron_config": "tensor-parallel shards are not whole tensors",
    "monteclora_config": "MonteCLoRA samples its weights, so it has no one update",
    "use_bdlora": "BD-LoRA is block-diagonal, which a stack of blocks is not",
    "use_qalora": "QALoRA pools its input, so it has no update of this form",
    "velora_config": "VeLoRA is not supported",
}
# Starts of lora_A and lora_B that leave the base weights alone, and those that do not.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_CHANGING_STARTS = ("corda", "loftq", "lora_ga", "olora", "pissa")

_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
# The heads that PEFT trains whole for a task, unasked. Before PEFT 0.11 its configs did not name them.
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}

_NAME = re.compile(r"[A-Za-z0-9._-]{1,512}")
_PATTERN_KEY = re.compile(r"\^?[A-Za-z0-9._-]{1,512}")
_NO_REGEX = "(letters, digits, dots, dashes and underscores: a regular expression is not evaluated)"
_TEXT = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,512}")


@dataclass(frozen=True)
class AdapterConfig:
    """What a merge needs of a client's adapter_config.json.

    Attributes:
        r, lora_alpha: the defaults; `rank_pattern` and `alpha_pattern` override them by dotted suffix of a module name,
            or by a whole one after `^`.
        modules_to_save: names of modules trained whole, those among them that PEFT trains whole for the task.
        target_parameters: names of parameters (not modules) with a low-rank update, such as experts.
        trainable_token_indices: by embedding module name; None where the file gives a bare list.
    """

    base_model: str | None = None
    task_type: str | None = None
    r: int = 8
    lora_alpha: float = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    trainable_token_indices: Mapping[str, tuple[int, ...]] | None = None

    @cached_property
    def _ranks(self) -> Pattern[int]:
        return Pattern(self.rank_pattern)

    @cached_property
    def _alphas(self) -> Pattern[float]:
        return Pattern(self.alpha_pattern)

    @cached_property
    def saved(self) -> Endings:
        """`modules_to_save`, as PEFT takes them: every module whose name ends in one of these."""
        return Endings(self.modules_to_save)

    @cached_property
    def tokens(self) -> Suffixes[tuple[int, ...]]:
        """`trainable_token_indices`, by dotted suffix of an embedding's name."""
        return Suffixes(self.trainable_token_indices or {})

    @cached_property
    def parameters(self) -> Mapping[str, Sequence[str]]:
        """The last parts of `target_parameters`, by what stands before them."""
        found: dict[str, list[str]] = {}
        for target in self.target_parameters:
            owner, _, parameter = target.rpartition(".")
            found.setdefault(owner, []).append(parameter)
        return found

    @property
    def largest_rank(self) -> int:
        """The largest r that it names."""
        return max(self.r, *self.rank_pattern.values(), 1)

    def rank(self, name: str) -> int:
        """The r that PEFT would give the module `name`."""
        return self._ranks.match(name, self.r)

    def alpha(self, name: str) -> float:
        """The lora_alpha that PEFT would give the module `name`."""
        return self._alphas.match(name, self.lora_alpha)

    def scaling(self, name: str, r: int) -> float:
        """The factor on B @ A in the module `name`, whose rank is `r`."""
        return self.alpha(name) / (math.sqrt(r) if self.use_rslora else r)


class ConfigReader:
    """Reads the parsed file field by field, and collects every reason to refuse it."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.problems: list[FileRefused] = []

    def take(self, name: str, default: Any, check: Callable[[Any], bool], expected: str) -> Any:
        """The field `name` where it passes `check`; null and absent mean `default`."""
        value = self.data.get(name)
        if value is None:
            return default
        if not check(value):
            self.problems.append(FileRefused(name, f"must be {expected}, is {str(value)[:60]!r}"))
            return default
        return value


def read_config(data: Mapping[str, Any], *, merged: bool = False) -> tuple[AdapterConfig | None, list[FileRefused]]:
    """A parsed adapter_config.json, and every reason to refuse it (none, for one that is accepted).

    The config is None where what it says of the tensors is refused, so that they cannot be held against it.

    Args:
        merged: whether it is that of a merged adapter, whose ranks and scalings may be larger than a client's.
    """
    if (kind := data.get("peft_type")) != "LORA":
        of_mlx = kind is None and not data.keys().isdisjoint(("fine_tune_type", "lora_parameters"))
        reason = ", and this is an adapter of MLX: it has to be converted first" if of_mlx else ""
        return None, [FileRefused("peft_type", f"must be LORA, is {str(kind)[:40]!r}{reason}")]
    reader = ConfigReader(data)
    max_r, max_scaling = (MAX_GLOBAL_R, MAX_GLOBAL_SCALING) if merged else (MAX_R, MAX_SCALING)

    def is_rank(value: object) -> bool:
        return type(value) is int and 1 <= value <= max_r

    def is_alpha(value: object) -> bool:
        return type(value) in (int, float) and 0 < value <= max_scaling * max_r  # type: ignore[operator]

    take = reader.take
    task = take("task_type", None, _TASKS.__contains__, f"one of {', '.join(_TASKS)}")
    config = AdapterConfig(
        # PEFT before 0.20 writes an empty name where a model came from no repository.
        base_model=take("base_model_name_or_path", None, _is_text_or_empty, "a text") or None,
        task_type=task,
        r=take("r", 8, is_rank, f"a whole number from 1 to {max_r}"),
        lora_alpha=take("lora_alpha", 8, is_alpha, "a finite number above 0"),
        rank_pattern=take("rank_pattern", {}, _is_pattern(is_rank), f"names of modules {_NO_REGEX} and ranks"),
        alpha_pattern=take("alpha_pattern", {}, _is_pattern(is_alpha), f"names of modules {_NO_REGEX} and numbers"),
        use_rslora=take("use_rslora", False, _is_bool, "true or false"),
        use_dora=take("use_dora", False, _is_bool, "true or false"),
        lora_bias=take("lora_bias", False, _is_bool, "true or false"),
        fan_in_fan_out=take("fan_in_fan_out", False, _is_bool, "true or false"),
        bias=take("bias", "none", ("none", "all", "lora_only").__contains__, "none, all or lora_only"),
        modules_to_save=(*take("modules_to_save", (), _is_names, "a list of module names"), *_HEADS.get(task, ())),
        target_parameters=tuple(take("target_parameters", (), _is_names, "a list of parameter names")),
        trainable_token_indices=_token_indices(reader),
    )
    return None if reader.problems else config, [*_refusals(data), *reader.problems]


def _refusals(data: Mapping[str, Any]) -> Iterator[FileRefused]:
    if reason := _not_plain(data.get("init_lora_weights")):
        yield FileRefused("init_lora_weights", reason)
    known = AdapterConfig.__dataclass_fields__.keys() - {"base_model"}
    known |= _IGNORED | {"peft_type", "init_lora_weights", "base_model_name_or_path"}
    for name, value in data.items():
        if name not in known and value not in (None, False, 0, "", [], {}):
            yield FileRefused(name[:80], _REFUSED.get(name, "is a field that lora-merge does not know"))


def _not_plain(start: object) -> str | None:
    """Why a start of lora_A and lora_B is refused; None where it leaves the base weights alone."""
    name = start.lower() if isinstance(start, str) else start  # PEFT takes Gaussian for gaussian
    if name in _PLAIN_STARTS:
        return None
    if not isinstance(name, str) or not name.startswith(_CHANGING_STARTS):
        return f"{str(start)[:40]!r} is a start that lora-merge does not know"
    way = "" if name == "loftq" else "; save_pretrained(…, path_initial_model_for_weight_conversion=…) makes it plain"
    return f"{name[:40]!r} changes the base weights{way}"


def _token_indices(reader: ConfigReader) -> Mapping[str, tuple[int, ...]] | None:
    value = reader.take("trainable_token_indices", None, _is_token_indices, "token indices, or lists of them by module")
    if value is None:
        return None
    by_module = {"": value} if isinstance(value, list) else value
    return {name: tuple(indices) for name, indices in by_module.items()}


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and _TEXT.fullmatch(value) is not None


def _is_text_or_empty(value: object) -> bool:
    return value == "" or _is_text(value)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and _NAME.fullmatch(name) for name in value)


def _is_pattern(check: Callable[[object], bool]) -> Callable[[object], bool]:
    def is_pattern(value: object) -> bool:
        if not (isinstance(value, dict) and all(_PATTERN_KEY.fullmatch(k) and check(v) for k, v in value.items())):
            return False
        return Pattern(value).most_alike <= MAX_ALIKE

    return is_pattern


def _is_token_indices(value: object) -> bool:
    def is_indices(items: object) -> bool:
        if not isinstance(items, list) or not all(type(item) is int and 0 <= item < 2**31 for item in items):
            return False
        return 0 < len(items) == len(set(items))

    if isinstance(value, dict):
        return bool(value) and all(_NAME.fullmatch(name) and is_indices(v) for name, v in value.items())
    return is_indices(value)
