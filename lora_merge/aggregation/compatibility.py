"""Whether the clients' updates can be averaged at all: every mismatch at once."""

from collections import Counter
from collections.abc import Iterator, Sequence

from lora_merge.adapter import Client, FactorsSpec, FullSpec, Spec
from lora_merge.errors import Problem


def module_names(clients: Sequence[Client]) -> list[str]:
    """Every name that some client has an update for, sorted."""
    return sorted({name for client in clients for name in client.adapter.specs})


def shape_problems(clients: Sequence[Client]) -> list[Problem]:
    """Every way in which the shapes of the clients' updates do not fit together."""
    problems = [problem for name in module_names(clients) for problem in _unequal(name, clients)]
    return problems + list(_trained_two_ways(clients)) + list(_kinds_that_exclude_each_other(clients))


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
        if spec.frozen:  # not another way
            return name, "whole"
        return name.removesuffix(".weight"), "whole"
    if isinstance(spec, FactorsSpec):
        return name, "by LoRA"
    return name.removesuffix(".token_adapter"), "by token rows"


def _kinds_that_exclude_each_other(clients: Sequence[Client]) -> Iterator[Problem]:
    """What PEFT cannot hold in one adapter cannot be merged into one."""
    specs = [(client.id, s) for client in clients for s in client.adapter.specs.values() if isinstance(s, FactorsSpec)]
    with_bias = next((client for client, spec in specs if spec.bias), None)
    with_dora = next((client for client, spec in specs if spec.magnitude), None)
    if with_bias and with_dora:
        yield Problem(with_bias, "lora_bias", f"cannot be merged with DoRA ({with_dora}): PEFT has no such adapter")
    for client, spec in specs:
        if with_bias and spec.layout in ("embedding", "experts"):
            yield Problem(
                client, spec.layout, f"cannot be merged with lora_bias ({with_bias}): PEFT has no such adapter"
            )
        if with_dora and (spec.layout == "experts" or (spec.layout == "conv" and spec.blocks > 1)):
            kind = "a grouped convolution" if spec.layout == "conv" else "experts"
            yield Problem(client, kind, f"cannot be merged with DoRA ({with_dora}): PEFT has no such adapter")
