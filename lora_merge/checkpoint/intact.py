"""A merged adapter's own files, held against the hashes that its ledger keeps of them.

That finds damage, and edits by hand. Whoever means to deceive writes the hashes anew, which is what `verify` is for; so
nothing is lost by taking a ledger of before there were hashes as it is: its files are read as strictly as any.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from lora_merge.checkpoint.peft_folder import CONFIG_NAME, CORE_NAME, LEDGER_NAME, WEIGHTS_NAME, file_sha256
from lora_merge.ledger import Ledger

OWN_NAMES = (CONFIG_NAME, WEIGHTS_NAME, CORE_NAME)
WAY_ON = "Take it from a sound copy (of a repository: download it again), or merge its clients anew."


def own_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of each of a merged adapter's own files, by name."""
    return {name: file_sha256(folder / name) for name in OWN_NAMES if (folder / name).is_file()}


def alterations(ledger: Ledger, found: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The files that are not what the merge wrote, each with what is wrong; `found` has the hashes of what is there.

    A core may be missing: without it a mean is folded in another way.
    """
    if ledger.files is None:
        return
    for name in OWN_NAMES:
        recorded, here = ledger.files.get(name), found.get(name)
        if here is None and name == CORE_NAME:
            continue
        if here is None or recorded is None:
            yield name, f"is not {'there' if here is None else f'among the files that {LEDGER_NAME} names'}"
        elif here != recorded:
            shown = f"its sha256 is {here[:16]}…, and {LEDGER_NAME} has {recorded[:16]}…"
            yield name, f"was damaged or altered since it was merged: {shown}"
