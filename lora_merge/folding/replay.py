"""A merge made again as its lock says: at once, or one fold after the other where later clients were folded in."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_merge.aggregation.robust import robust_of
from lora_merge.checkpoint.planned import CertificateMode
from lora_merge.folding.corridor import fold_folder
from lora_merge.folding.how import How, Located
from lora_merge.intake import Reading
from lora_merge.lock import Lock
from lora_merge.pipeline import aggregate
from lora_merge.sources.reference import AdapterRef


def replay(
    lock: Lock,
    refs: Mapping[str, AdapterRef],
    target: Path,
    *,
    core: bool,
    certificate: CertificateMode | None,
    base: str | Path | None,
    device: str,
    workers: int | None,
    reading: Reading,
) -> None:
    """Merge the lock's inputs, which lie at `refs` by client id, into the folder `target`; with a `core` or without.

    Nothing is screened: whoever is in was let in. What the last step wrote is measured, as `certificate` says.
    """
    first, *later = lock.folded or [[entry.client_id for entry in lock.inputs]]
    n = {entry.client_id: entry.weight for entry in lock.inputs}
    sources = {client: ref.itself for client, ref in refs.items()}
    weights = {str(sources[client]): n[client] for client in n}

    def of(group: Sequence[str]) -> tuple[list[str | Path], dict[str, float]]:
        return [sources[client] for client in group], {str(sources[c]): weights[str(sources[c])] for c in group}

    named, given = of(first)
    aggregate(
        named,
        target,
        method=lock.method,
        rank=lock.options.get("rank"),
        energy=lock.options.get("energy") if lock.options.get("rank") == "auto" else None,
        density=lock.options.get("density"),
        seed=lock.options.get("seed"),
        robust=robust_of(lock.options),
        weights=given,
        global_lr=lock.global_lr,
        base=base,
        dtype=lock.dtype,
        device=device,
        certificate="off" if later else certificate,
        workers=workers,
        core=core,
        screening=None,
        max_wait=reading.max_wait,
        tell=reading.tell,
        progress=reading.progress,
    )
    for number, group in enumerate(later, start=1):
        named, given = of(group)
        measured = certificate if number == len(later) else "off"
        how = How({}, given, base, device, certificate=measured, workers=workers, pinned=False)
        fold_folder(named, Located(target, str(target)), target, (), how, reading)
