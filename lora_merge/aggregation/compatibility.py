"""Whether the clients' updates can be averaged at all: every mismatch at once."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from lora_merge.adapter import Client, FactorsSpec, FullSpec, Spec, name_in_base
from lora_merge.errors import Problem


def module_names(clients: Sequence[Client]) -> list[str]:
    """Every name that some client has an update for, sorted."""
    return sorted({name for client in clients for name in client.adapter.specs})


def shape_problems(clients: Sequence[Client]) -> list[Problem]:
    """Every way in which the shapes of the clients' updates do not fit together."""
    problems = [problem for name in module_names(clients) for problem in _unequal(name, clients)]
    return [
        *problems,
        *_trained_two_ways(clients),
        *_named_otherwise(clients),
        *_kinds_that_exclude_each_other(clients),
    ]


def _unequal(name: str, clients: Sequence[Client]) -> Iterator[Problem]:
    """The clients whose update of `name` has another shape than most have."""
    shapes = {client.id: _shape(client.adapter.specs[name]) for client in clients if name in client.adapter.specs}
    usual, count = Counter(shapes.values()).most_common(1)[0]
    for client, shape in shapes.items():
        if shape != usual:
            yield Problem(client, name, f"is {shape}, where {count} of {len(shapes)} clients have {usual}")


def _shape(spec: Spec) -> str:
    """What has to be equal between clients; ranks and scalings need not be."""
    if isinstance(spec, FullSpec):
        return f"a full tensor {'x'.join(map(str, spec.shape))}"
    if isinstance(spec, FactorsSpec):
        blocks = f"{spec.blocks} blocks of " if spec.blocks > 1 else ""
        kernel = f", kernel {'x'.join(map(str, spec.kernel))}" if spec.kernel else ""
        return f"{spec.layout} {blocks}{spec.d_out}x{spec.d_in}{kernel}"
    return f"rows of {spec.d} numbers"


def _trained_two_ways(clients: Sequence[Client]) -> Iterator[Problem]:
    """A module that some clients adapt by LoRA and others train whole has no single form to write."""
    first: dict[str, tuple[str, str]] = {}
    for client in clients:
        for name, spec in client.adapter.specs.items():
            module, way = _way(name, spec)
            other, known = first.setdefault(module, (client.id, way))
            if known != way:
                yield Problem(client.id, name, f"is trained {way}, but {known} by {other}")


def _way(name: str, spec: Spec) -> tuple[str, str]:
    if isinstance(spec, FullSpec):
        module, _, parameter = name.rpartition(".")
        if spec.frozen or parameter == "bias":  # not another way
            return name, "whole"
        return module, "whole"
    if isinstance(spec, FactorsSpec):
        return name_in_base(name), "by LoRA"
    return name.removesuffix(".token_adapter"), "by token rows"


def _named_otherwise(clients: Sequence[Client]) -> Iterator[Problem]:
    """Clients that have no low-rank module in common with most, but some of theirs under another path.

    A file names modules as the model's code does, and that changes from release to release. Each such client would be
    merged as one that lacks all modules of the others, and the mean would be a part of what it should be.
    """
    seen = {id(client.adapter.specs): _low_rank(client.adapter.specs) for client in clients}  # mostly one for all
    own = {client.id: found for client in clients if (found := seen[id(client.adapter.specs)])}
    if len(set(own.values())) < 2:
        return
    usual = Counter(own.values()).most_common(1)[0][0]
    known = usual.union(*(modules for modules in own.values() if not modules.isdisjoint(usual)))
    by_layer: dict[tuple[str, str], list[str]] = {}
    for name, shape in sorted(known):
        if end := _layer(name):
            by_layer.setdefault((end, shape), []).append(name)
    for client, modules in own.items():
        if modules.isdisjoint(known):
            alike = ((name, by_layer.get((_layer(name), shape), ())) for name, shape in sorted(modules))
            twins = ((name, other) for name, others in alike for other in others)
            if pair := next((pair for pair in twins if _is_respelled(*pair)), None):
                reason = f"seems to be {pair[1]} under the name that another release of the model's code gave it"
                yield Problem(client, pair[0], reason)


def _low_rank(specs: Mapping[str, Spec]) -> frozenset[tuple[str, str]]:
    return frozenset((name, _shape(spec)) for name, spec in specs.items() if isinstance(spec, FactorsSpec))


def _layer(module: str) -> str:
    """`layers.0.self_attn.q_proj` of `model.language_model.layers.0.self_attn.q_proj`; empty without a number."""
    parts = module.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return "" if first is None else ".".join(parts[max(first - 1, 0) :])


def _is_respelled(one: str, other: str) -> bool:
    """Whether two modules of one layer may be one: what stands before that is the same, in another order, or less."""
    before, beside = (Counter(name.removesuffix(_layer(name)).split(".")) for name in (one, other))
    return before <= beside or beside <= before


def _kinds_that_exclude_each_other(clients: Sequence[Client]) -> Iterator[Problem]:
    """What PEFT cannot hold in one adapter cannot be merged into one."""
    specs = [
        (client.id, kind_of(name, spec), spec)
        for client in clients
        for name, spec in client.adapter.specs.items()
        if isinstance(spec, FactorsSpec)
    ]
    with_bias = next((client for client, _, spec in specs if spec.bias), None)
    with_dora = next((client for client, _, spec in specs if spec.magnitude), None)
    if with_bias and with_dora:
        yield Problem(with_bias, "lora_bias", f"cannot be merged with DoRA ({with_dora}): PEFT has no such adapter")
    for client, kind in dict.fromkeys((client, kind) for client, kind, _ in specs):
        if with_bias and kind in ("embedding", "experts"):
            yield Problem(client, kind, f"cannot be merged with lora_bias ({with_bias}): PEFT has no such adapter")
        if with_dora and kind in ("a grouped convolution", "experts", "MultiheadAttention"):
            yield Problem(client, kind, f"cannot be merged with DoRA ({with_dora}): PEFT has no such adapter")


def kind_of(name: str, spec: FactorsSpec) -> str:
    """The kind of a low-rank module as its users know it."""
    if name.endswith(".base_layer.out_proj"):
        return "MultiheadAttention"
    return "a grouped convolution" if spec.layout == "conv" and spec.blocks > 1 else spec.layout
