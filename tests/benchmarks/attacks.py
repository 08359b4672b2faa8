"""What hostile clients do to a merge, and what each rule does about it: small trained models, as a table.

    python tests/benchmarks/attacks.py [--quick]

A byte-level Llama is trained here on Python's help texts, then ten LoRA clients on the code of a package each; up to
three of them are hostile. Every merge is `lora_merge.aggregate` of PEFT folders, in TMPDIR; every figure is from PEFT's
forward pass. No attacker here adapts to the rule: what a rule stops in this table, it does not stop for certain.
"""

import argparse
import hashlib
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from llama_7b import temporary_folder
from small_federation import (
    PACKAGES,
    QUICK,
    WEIGHTS,
    Backdoor,
    Judged,
    Size,
    Text,
    fine_tune,
    hand_in,
    judged,
    median_norm,
    norm_of,
    pretrained,
    text_of,
)

from lora_merge import aggregate
from lora_merge.aggregation.robust import Robust
from lora_merge.errors import RefusedError
from lora_merge.screening.stops import Screening

LEFT = 0.3  # of three hostile updates, in a mean of ten
FIRST, SECOND, THIRD = PLACES = (4, 0, 8)  # 29 % of all examples


@dataclass(frozen=True)
class Hostile:
    """What a client hands in: its own adapter, or a backdoored one, times a factor.

    Attributes:
        place: the client whose id and count it uses.
        backdoored: what was trained with a backdoor, by its name; None for the honest adapter of its place.
        norm: in the place of `times`, the norm that it has, in medians of the honest ones.
        turned: as other factors of the same product.
    """

    place: int
    times: float = 1.0
    backdoored: str | None = None
    norm: float | None = None
    turned: bool = False


ATTACKS: Mapping[str, tuple[Hostile, ...]] = {
    "none": (),
    "1: update x10": (Hostile(FIRST, 10),),
    "1: update x100": (Hostile(FIRST, 100),),
    "3: update x100": tuple(Hostile(place, 100) for place in PLACES),
    "3: sign flipped, x-1": tuple(Hostile(place, -1) for place in PLACES),
    "3: sign flipped, x-5": tuple(Hostile(place, -5) for place in PLACES),
    "1: NaN": (Hostile(FIRST, float("nan")),),
    "1: backdoor x1": (Hostile(FIRST, backdoored="alone"),),
    "1: backdoor x3": (Hostile(FIRST, 3, backdoored="alone"),),
    "1: backdoor x10": (Hostile(FIRST, 10, backdoored="alone"),),
    "3: copies of one backdoor": (
        *(Hostile(place, backdoored=f"colluding-{FIRST}") for place in (FIRST, SECOND)),
        Hostile(THIRD, backdoored=f"colluding-{FIRST}", turned=True),
    ),
    "3: colluding backdoors, 2.9 x the median norm": tuple(
        Hostile(place, backdoored=f"colluding-{place}", norm=2.9) for place in PLACES
    ),
    "3: colluding backdoors, the largest honest norm": tuple(
        Hostile(place, backdoored=f"matched-{place}") for place in PLACES
    ),
    "3: colluding backdoors, the median norm": tuple(
        Hostile(place, backdoored=f"matched-{place}", norm=1.0) for place in PLACES
    ),
}
ANY_SIZE = Screening(allow_outliers=True)
RULES: Mapping[str, Mapping[str, Any]] = {
    "`--allow-outliers` (mean)": {"screening": ANY_SIZE},
    "`--drop-duplicates`": {"screening": Screening(allow_outliers=True, drop_duplicates=True)},
    "`--clip 3x`": {"robust": Robust(clip="3x")},
    "geometric-median": {"robust": Robust(rule="geometric-median")},
    "krum": {"robust": Robust(rule="krum", byzantine=3)},
    "multi-krum": {"robust": Robust(rule="multi-krum", byzantine=3)},
    "median": {"robust": Robust(rule="median")},
    "trimmed-mean": {"robust": Robust(rule="trimmed-mean", trim=0.3)},
}


@dataclass
class Bench:
    """The base model, ten honest adapters, the backdoored ones by name, and what was judged so far."""

    root: Path
    base: Any
    text: Text
    honest: Sequence[Path]
    backdoored: Mapping[str, Path]
    seen: dict[str, Judged] = field(default_factory=dict)
    merges: int = 0

    def judge(self, adapter: Path | None) -> Judged:
        """The same bytes are judged once."""
        key = hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest() if adapter else ""
        if key not in self.seen:
            self.seen[key] = judged(self.base, adapter, self.text.held_out)
        return self.seen[key]

    def merge(self, clients: Sequence[Path], **options: Any) -> tuple[Path, Sequence[str]]:
        """The global adapter, and what was warned of."""
        self.merges += 1
        result = aggregate(clients, self.root / f"global-{self.merges}", certificate="off", **options)
        return result.output, result.warnings

    def handed_in(self, name: str, attack: Sequence[Hostile]) -> list[Path]:
        """The ten adapters under an attack."""
        folders = list(self.honest)
        for each in attack:
            adapter = self.honest[each.place] if each.backdoored is None else self.backdoored[each.backdoored]
            times = each.times if each.norm is None else each.norm * median_norm(self.honest) / norm_of(adapter)
            folder = self.root / name.translate({ord(char): "-" for char in " :,."}) / client_name(each.place)
            count = len(self.text.train[each.place])
            folders[each.place] = hand_in(adapter, folder, folder.name, count, times=times, turned=each.turned)
        return folders


def client_name(place: int) -> str:
    return f"client-{place}"


def prepared(root: Path, size: Size) -> Bench:
    """Train everything."""
    text = text_of(size)
    base = pretrained(text, size, root / "base")
    places = range(len(PACKAGES))
    honest = [fine_tune(base, text.train[i], size.epochs, client_name(i), root / client_name(i)) for i in places]
    ways = {"alone": (FIRST, Backdoor())}
    for place in PLACES:
        ways[f"colluding-{place}"] = place, Backdoor(LEFT)
        ways[f"matched-{place}"] = place, Backdoor(LEFT, max(map(norm_of, honest)))
    backdoored = {
        name: fine_tune(base, text.train[i], size.epochs, client_name(i), root / name, how)
        for name, (i, how) in ways.items()
    }
    return Bench(root, base, text, honest, backdoored)


def row(bench: Bench, name: str) -> list[str]:
    """The table's row of one attack."""
    attack = ATTACKS[name]
    has_backdoor = any(each.backdoored is not None for each in attack)
    hostile = {each.place for each in attack}
    rest = [folder for place, folder in enumerate(bench.honest) if place not in hostile]
    clients = bench.handed_in(name, attack)
    cells = [name, shown(bench.judge(bench.merge(rest)[0]), has_backdoor), default(bench, clients)]
    for options in RULES.values():
        try:
            cells.append(shown(bench.judge(bench.merge(clients, **options)[0]), has_backdoor))
        except RefusedError as error:
            cells.append(stopped(error))
    return cells


def default(bench: Bench, clients: Sequence[Path]) -> str:
    """What `aggregate` says where nothing is asked for. What it merges is what `--allow-outliers` merges."""
    try:
        _, warned = bench.merge(clients)
    except RefusedError as error:
        return stopped(error)
    copies = sum("has nearly the update" in line or "has the same weights" in line for line in warned)
    return f"merged, {copies} copies named" if copies else "merged"


def stopped(error: RefusedError) -> str:
    why = "norm" if {problem.field for problem in error.problems} == {"update"} else "not finite"
    return f"exit {error.exit_code}: {why}"


def shown(figures: Judged, has_backdoor: bool) -> str:
    loss = f"{figures.loss:.2f}"
    return f"{loss}, {figures.backdoor:.0%}" if has_backdoor else loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a model too small to mean anything, to try the script")
    size = QUICK if parser.parse_args().quick else Size()
    quiet()
    torch.set_num_threads(1)  # so small a model gains little by more, and loses much on a busy machine
    started = time.monotonic()
    with temporary_folder() as root:
        bench = prepared(root, size)
        heading(bench, time.monotonic() - started)
        for name in ATTACKS:
            print(f"| {' | '.join(row(bench, name))} |", flush=True)
    print(f"\n{bench.merges} merges, {time.monotonic() - started:.0f} s in all")


def quiet() -> None:
    """Nothing but the table: no progress of one file's reading, and none of transformers' word to PEFT."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def heading(bench: Bench, seconds: float) -> None:
    base, examples = bench.judge(None), sum(map(len, bench.text.train))
    parameters = sum(each.numel() for each in bench.base.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {examples} rows, trained in {seconds:.0f} s; base: {base.loss:.2f}")
    for adapter in (*bench.honest, *bench.backdoored.values()):
        print(f"{adapter.name}: norm {norm_of(adapter):.2f}, {shown(bench.judge(adapter), True)}")
    columns = ["hostile of ten", "honest only", "default", *RULES]
    print(f"\n| {' | '.join(columns)} |\n| {' | '.join(['---'] * len(columns))} |", flush=True)


if __name__ == "__main__":
    main()
