"""What is mutated: sound folders of many kinds, and the records of sound merges."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from lora_merge import aggregate
from lora_merge.folding.onto import fold
from tests import models
from tests.adapters import CONFIG, KINDS, STATEMENT, WEIGHTS, Kind, clients, edited, federation
from tests.fuzz import documents, likely, weights
from tests.fuzz.judges import CORE_RANK, judge_core, judge_folder, judge_global, judge_ledger, judge_lock

LEDGER, LOCK, CORE = "aggregation.json", "lora-merge.lock", "aggregation_core.safetensors"
COMMITS = ("1" * 40, "2" * 40, "3" * 40)
OF_KINDS = (
    "linear",
    "rank and alpha patterns",
    "Conv1D",
    "embedding",
    "head with a bias",
    "convolutions",
    "lora_bias",
    "bias all",
    "modules_to_save",
    "tokens",
    "experts",
    "MultiheadAttention",
    "DoRA",
)
# So narrow that the blocks of its clients stay apart in a merge, which others can then be folded onto.
THIN = Kind("thin", models.llama, clients({"r": 1}, {"r": 2}, common={"target_modules": ["q_proj", "o_proj"]}))
WITH_CORE = (THIN.name, "linear", "convolutions")
BUILT = (THIN, *(kind for kind in KINDS if kind.name in OF_KINDS))
FILES = (WEIGHTS, CONFIG, STATEMENT, LEDGER, LOCK, CORE)


@dataclass(frozen=True)
class Case:
    """One mutant: of which file, and the seed that makes it."""

    file: str
    seed: int

    def __str__(self) -> str:
        return f"{self.file}, seed {self.seed}"


def make_corpus(root: Path, kinds: Sequence[Kind] = BUILT) -> Path:
    """Write the sound files under `root`: a folder for each kind, with two clients and the records of their merges."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for kind in kinds:
        made = federation(kind, root / kind.name)
        edited(made.clients[0], root / kind.name / "late")
        for method in ("exact", "svd"):
            aggregate(made.clients, root / kind.name / method, method=method, base=made.base, workers=1)
        if kind.name in WITH_CORE:
            fold(made.clients, root / kind.name / "core", method="svd", rank=CORE_RANK, base=made.base, workers=1)
    return root


class Corpus:
    """The sound files in memory, and a folder for one mutant at a time."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self.kinds = sorted(path for path in root.iterdir() if path.is_dir())
        self.scratch, self.folder = scratch, scratch / "in" / "mutant"
        self._loaded: dict[Path, bytes] = {}

    def source(self, random: Random, case: Case) -> Path:
        """The folder whose file is mutated: a client's, or a merge's."""
        records = case.file in (LEDGER, LOCK)
        if case.file == CORE:
            return random.choice([kind for kind in self.kinds if kind.name in WITH_CORE]) / "core"
        kinds = [kind for kind in self.kinds if kind.name == THIN.name] if random.random() < 0.3 else self.kinds
        return random.choice(kinds) / random.choice(["exact", "svd"] if records else ["client-0", "client-1"])

    def mutant(self, case: Case) -> bytes:
        """The mutant's bytes."""
        random = Random(f"{case.file} {case.seed}")
        data = self._read(self.source(random, case) / case.file)
        if case.file in (WEIGHTS, CORE):
            return weights.mutant(random, data)
        document = json.loads(data)
        if case.file in (LEDGER, LOCK) and random.random() < 0.5:
            document = _pinned(document)
        return documents.mutant(random, document, LIKELY[case.file])

    def judge(self, case: Case, data: bytes | None = None) -> str:
        """How the mutant ended; raises whatever is not a documented refusal. A merge is left at `merged`."""
        data = self.mutant(case) if data is None else data
        if case.file == LOCK:
            return judge_lock(data)
        random = Random(f"{case.file} {case.seed}")
        source = self.source(random, case)
        late, base = source.with_name("late"), source.with_name("base")
        if case.file == CORE:
            ledger = json.loads(self._read(source / LEDGER))
            ledger["files"][CORE] = hashlib.sha256(data).hexdigest()  # else it is refused before it is read
            mutated = {CORE: data, LEDGER: json.dumps(ledger).encode()}
            self._write(self.scratch / "global", source, (WEIGHTS, CONFIG, LOCK), mutated)
            return judge_core(self.scratch / "global", late, base, self.merged)
        if case.file == LEDGER:
            if (how := judge_ledger(data)) != "accepted":
                return how
            self._write(self.scratch / "global", source, (WEIGHTS, CONFIG, LOCK), {LEDGER: data})
            return judge_global(
                self.scratch / "global", source.with_name("late"), source.with_name("base"), self.merged
            )
        self._write(self.folder, source, (WEIGHTS, CONFIG, STATEMENT), {case.file: data})
        peer = source.with_name("client-1" if source.name == "client-0" else "client-0")
        return judge_folder(random, self.folder, peer, self.merged)

    def _write(self, folder: Path, source: Path, names: Sequence[str], mutated: Mapping[str, bytes]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in {*names, *mutated}:
            (folder / name).write_bytes(mutated[name] if name in mutated else self._read(source / name))

    @property
    def merged(self) -> Path:
        return self.scratch / "out"

    def _read(self, path: Path) -> bytes:
        if path not in self._loaded:
            self._loaded[path] = path.read_bytes()
        return self._loaded[path]


LIKELY: Mapping[str, Mapping[str, Sequence[Any]]] = {
    CONFIG: likely.CONFIG,
    STATEMENT: likely.STATEMENT,
    LEDGER: likely.LEDGER,
    LOCK: likely.LOCK,
}


def _pinned(document: dict[str, Any]) -> dict[str, Any]:
    """A record as of clients that came from the Hub, with a recipe."""
    clients = document.get("contributions", document.get("inputs"))
    for client, commit in zip(clients, COMMITS, strict=False):
        client |= {"source": client["client_id"], "commit": commit}
        if "recipe" in client:
            client["recipe"] = {"name": "laptop", "digest": likely.HASH, "prompt_form": "plain", "overrides": {"r": 4}}
    return document
