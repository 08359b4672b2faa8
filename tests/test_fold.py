"""Folding: whatever the order in which clients arrive, are replaced or withdrawn, the end is that of one merge."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_merge import aggregate
from lora_merge.errors import ConflictError, NotFoundError, RefusedError, UsageError
from lora_merge.folding import corridor
from lora_merge.folding.onto import fold
from lora_merge.verify import verify
from tests.adapters import KINDS, Client, Kind, edited, rewrite_json
from tests.conftest import Federations, digests
from tests.dense import error, mean_model
from tests.folds import FILES, SCREENING, interleaved, mean_of, truncated, write_client
from tests.folds import error as error_of

SAME = ("adapter_model.safetensors", "adapter_config.json", "lora-merge.lock")


def same_as_one_merge(folded: Path, folders: list[Path], scratch: Path, **options: Any) -> None:
    """The bytes that a fold promises are those of one merge of the same folders."""
    aggregate(folders, scratch, screening=None, **options)
    one, other = digests(scratch), digests(folded)
    assert {name: other[name] for name in SAME} == {name: one[name] for name in SAME}
    shutil.rmtree(scratch)


def thin(name: str) -> Kind:
    """A kind whose clients' ranks together stay below its modules' widths."""
    kind = next(kind for kind in KINDS if kind.name == name)
    if name == "convolutions":  # a grouped one's r counts both of its groups; others are narrower than two clients
        common: dict[str, Any] = {"r": 2, "target_modules": ["square", "grouped", "line"]}
        return replace(kind, name=f"thin {name}", clients=tuple(replace(c, lora=common) for c in kind.clients[:3]))
    ranks = (1, 2, 1, 1)
    thinner = [replace(client, lora={**client.lora, "r": r}) for client, r in zip(kind.clients, ranks, strict=False)]
    return replace(kind, name=f"thin {name}", clients=tuple(thinner))


STACKED = [
    thin(name)
    for name in (
        "linear",
        "ranks, scalings, modules and float types of each client's own",
        "Conv1D",
        "tied embedding",
        "convolutions",
        "experts",
        "experts of one parameter",
        "experts that some lack",
        "Mixtral",
        "names that end in each other, with ranks and scalings of their own",
        "MultiheadAttention",
    )
]


@pytest.mark.parametrize("kind", STACKED, ids=lambda kind: kind.name)
def test_one_after_the_other_gives_the_bytes_of_one_merge(kind: Kind, federations: Federations, tmp_path: Path) -> None:
    folders = list(federations(kind).clients)
    for order in (folders, folders[::-1], [*folders[1:], folders[0]]):
        onto = tmp_path / "global"
        for i in range(len(order)):
            assert fold(order[i : i + 1], onto).again is None
            same_as_one_merge(onto, order[: i + 1], tmp_path / "one")
        shutil.rmtree(onto)


def narrow(kind: Kind) -> Kind:
    """A kind at rank 1, so that what can be a stack is one, with one more client that trained nothing but LoRA."""
    r = 2 if "convolution" in kind.name else 1  # of a grouped one, two blocks
    own = [{name: v for name, v in client.lora.items() if name != "rank_pattern"} | {"r": r} for client in kind.clients]
    where = ("r", "target_modules", "target_parameters", "task_type", "fan_in_fan_out")
    plain = Client({name: own[0][name] for name in where if name in own[0]})
    clients = [replace(client, lora=lora) for client, lora in zip(kind.clients, own, strict=True)]
    return replace(kind, name=f"narrow {kind.name}", clients=(*clients, plain))


NARROW = [
    narrow(kind)
    for kind in KINDS
    if any(kind.clients[0].lora.get(name) for name in ("target_modules", "target_parameters"))
]


@pytest.mark.parametrize("kind", NARROW, ids=lambda kind: kind.name)
def test_whoever_comes_or_goes_nothing_of_those_who_stay_is_lost(
    kind: Kind, federations: Federations, tmp_path: Path
) -> None:
    """Of every kind of adapter, and plain ones beside it; where the clients' files are needed, they are named."""
    made, onto = federations(kind), tmp_path / "global"
    *clients, plain = made.clients

    def step(arrives: list[Path], leaves: list[str], after: list[Path]) -> None:
        try:
            fold(arrives, onto, withdraw=leaves, base=made.base, screening=None)
        except NotFoundError:
            fold(after, onto, withdraw=leaves, base=made.base, screening=None)
        same_as_one_merge(onto, after, tmp_path / "one", base=made.base)

    step(clients, [], clients)
    step([plain], [], [*clients, plain])
    step([], [f"org/{clients[0].name}"], [*clients[1:], plain])
    step([], [f"org/{client.name}" for client in clients[1:]], [plain])
    step([clients[0]], [], [clients[0], plain])
    step([], [f"org/{plain.name}"], clients[:1])


def test_a_mean_is_folded_and_made_again_in_the_order_of_its_arrivals(federations: Federations, tmp_path: Path) -> None:
    folders = list(federations(thin("linear")).clients)
    for method, options in (("svd", {"rank": 2}), ("fedavg", {})):
        kind = folders if method == "svd" else [edited(folders[0], tmp_path / f"same-{i}") for i in range(3)]
        onto = tmp_path / method
        fold(kind[:1], onto, method=method, **options)
        fold(kind[1:2], onto)
        assert fold(kind[2:], onto).again is None
        assert verify(onto, kind).verdict == "identical"


@pytest.fixture
def thin_clients(federations: Federations) -> list[Path]:
    return list(federations(thin("linear")).clients)


@pytest.mark.parametrize("seed", range(3))
def test_any_interleaving_of_arrivals_replacements_and_withdrawals_ends_in_the_bytes_of_one_merge(
    seed: int, tmp_path: Path
) -> None:
    clients = [write_client(tmp_path / "now" / f"client-{i}", i, 24, 1 + i % 2) for i in range(10)]
    former = [write_client(tmp_path / "former" / f"client-{i}", 50 + i, 24, 2 - i % 2) for i in range(10)]
    guests = [write_client(tmp_path / "guests" / f"guest-{i}", 90 + i, 24, 1) for i in range(2)]
    onto = tmp_path / "global"
    for step in interleaved(clients, former, guests, seed):
        leaves = [step.leaves] if step.leaves else []
        fold([step.arrives] if step.arrives else [], onto, withdraw=leaves, screening=SCREENING)
    same_as_one_merge(onto, clients, tmp_path / "one")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_global_in_half_precision_is_folded_to_the_bytes_of_one_merge(
    dtype: str, thin_clients: list[Path], tmp_path: Path
) -> None:
    onto = tmp_path / "global"
    fold(thin_clients[1:], onto, dtype=dtype, global_lr=0.5)
    assert fold(thin_clients[:1], onto).again is None
    same_as_one_merge(onto, thin_clients, tmp_path / "one", dtype=dtype, global_lr=0.5)


def test_clients_of_weight_zero_are_in_the_ledger_and_in_no_stack(thin_clients: list[Path], tmp_path: Path) -> None:
    onto, weights = tmp_path / "global", {"org/client-0": 2.0, "org/client-1": 0.0, "org/client-2": 3.0}
    fold(thin_clients[:2], onto, weights={name: weights[name] for name in ("org/client-0", "org/client-1")})
    fold(thin_clients[2:], onto, weights={"org/client-2": 3.0})
    same_as_one_merge(onto, thin_clients, tmp_path / "one", weights=weights)


def test_a_client_of_weight_zero_may_come_alone(thin_clients: list[Path], tmp_path: Path) -> None:
    onto, weights = tmp_path / "global", {"org/client-0": 2.0, "org/client-1": 0.0, "org/client-2": 3.0}
    for i, client in enumerate(thin_clients):
        made = fold([client], onto, weights={f"org/client-{i}": weights[f"org/client-{i}"]})
        assert made.added == [f"org/client-{i}"]
    same_as_one_merge(onto, thin_clients, tmp_path / "one", weights=weights)
    with pytest.raises(UsageError, match="sum to zero"):
        fold(thin_clients[1:2], tmp_path / "nobody", weights={"org/client-1": 0.0})


@pytest.mark.parametrize("name", ["/models/llama", "tiny"])
@pytest.mark.parametrize("method", ["exact", "svd"])
def test_a_base_known_by_a_path_keeps_its_name_whoever_comes_and_goes(
    method: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    clients = [plain_client(tmp_path / f"client-{i}", i, name) for i in range(4)]
    onto, rank = tmp_path / "global", {"rank": 2} if method == "svd" else {}
    aggregate(clients[:3], onto, method=method, weights="uniform", screening=None, **rank)
    files = clients[:3] if method == "svd" else []
    for made in (
        fold([clients[3], *files], onto, screening=None),
        fold(files, onto, withdraw=["client-3"], screening=None),
    ):
        assert not [line for line in made.warnings if "named differently" in line]
    assert json.loads((onto / SAME[1]).read_text())["base_model_name_or_path"] == name
    same_as_one_merge(onto, clients[:3], tmp_path / "one", method=method, weights="uniform", **rank)
    assert verify(onto, clients[:3]).verdict == "identical"


def test_beside_a_repositorys_name_no_path_is_kept_and_what_depends_on_one_is_read_again(tmp_path: Path) -> None:
    clients = [plain_client(tmp_path / f"client-{i}", i, f"/home/{i}/llama" if i else "org/base") for i in range(4)]
    onto = tmp_path / "global"
    fold(clients[1:3], onto, weights="uniform", screening=None)
    same_as_one_merge(onto, clients[1:3], tmp_path / "one", weights="uniform")
    fold(clients[:1], onto, screening=None)
    fold(clients[3:], onto, screening=None)
    assert b"/home/" not in b"".join(path.read_bytes() for path in onto.iterdir())
    same_as_one_merge(onto, clients, tmp_path / "one", weights="uniform")
    before = digests(onto)
    with pytest.raises(NotFoundError, match="a path of client-1, which is not kept"):
        fold([], onto, withdraw=["client-0"])
    assert digests(onto) == before
    assert fold(clients[1:], onto, withdraw=["client-0"], screening=None).again
    same_as_one_merge(onto, clients[1:], tmp_path / "one", weights="uniform")


def plain_client(folder: Path, seed: int, base: str) -> Path:
    """A PEFT folder that states nothing, of a base that it calls `base`."""
    write_client(folder, seed, 24, 2)
    (folder / "lora_merge.json").unlink()
    rewrite_json(folder / SAME[1], {"base_model_name_or_path": base})
    return folder


def test_peft_answers_with_the_folded_mean(federations: Federations, tmp_path: Path) -> None:
    kind = thin("linear")
    folders = federations(kind).clients
    for folder in folders:
        fold([folder], tmp_path / "global")
    assert error(kind, tmp_path / "global", mean_model(kind, folders, kind.weights)) < 5e-6


NEEDS_FILES = [
    kind
    for kind in KINDS
    if kind.name in ("linear", "embedding", "lora_bias", "bias all", "modules_to_save", "tokens", "DoRA")
]


@pytest.mark.parametrize("kind", NEEDS_FILES, ids=lambda kind: kind.name)
def test_what_blocks_cannot_hold_is_merged_again_from_the_clients_files_or_nothing_is_changed(
    kind: Kind, federations: Federations, tmp_path: Path
) -> None:
    made = federations(kind)
    folders, onto = list(made.clients), tmp_path / "global"
    fold(folders[:1], onto, base=made.base_argument)
    before = digests(onto)
    with pytest.raises(NotFoundError, match="Nothing was changed"):
        fold(folders[1:], onto, base=made.base_argument)
    assert digests(onto) == before
    assert fold(folders, onto, base=made.base_argument).again
    same_as_one_merge(onto, folders, tmp_path / "one", base=made.base_argument)


def test_a_lora_a_that_all_share_is_seen_though_only_its_multiple_is_stored(tmp_path: Path) -> None:
    first = write_client(tmp_path / "client-0", 0, 24, 2)
    start = {name: value for name, value in load_file(first / FILES[0]).items() if "lora_A" in name}
    folders = [first]
    for i in (1, 2):
        folders.append(write_client(tmp_path / f"client-{i}", i, 24, 2))
        save_file({**load_file(folders[i] / FILES[0]), **start}, folders[i] / FILES[0])
    other = write_client(tmp_path / "client-9", 3, 24, 2)
    onto = tmp_path / "global"
    for folder in (first, other):
        fold([folder], onto)
    assert fold(folders[1:], onto).again is None
    assert fold(folders, onto, withdraw=["org/client-9"]).again
    same_as_one_merge(onto, folders, tmp_path / "one")
    fold([other, *folders], onto)
    same_as_one_merge(onto, [*folders, other], tmp_path / "one")


def test_nothing_new_writes_nothing(thin_clients: list[Path], tmp_path: Path) -> None:
    onto = tmp_path / "global"
    fold(thin_clients, onto)
    before = {path: path.stat().st_mtime_ns for path in onto.iterdir()}
    made = fold(thin_clients, onto)
    assert (made.changed, made.output) == (False, onto)
    assert {path: path.stat().st_mtime_ns for path in onto.iterdir()} == before


@pytest.mark.parametrize("options", [{}, {"method": "svd", "rank": 2}], ids=["exact", "svd"])
def test_a_result_that_is_asked_for_elsewhere_is_made_though_nothing_is_new(
    options: dict[str, Any], thin_clients: list[Path], tmp_path: Path
) -> None:
    onto, other = tmp_path / "global", tmp_path / "other"
    fold(thin_clients[:2], onto, **options)
    before = digests(onto)
    made = fold(thin_clients[:1], onto, output=other)
    assert (made.changed, made.output) == (False, other)
    assert digests(onto) == digests(other) == before
    with pytest.raises(UsageError, match="exists already"):
        fold(thin_clients[:1], onto, output=other)
    assert not fold([], onto, output=other, force=True).changed
    assert fold(thin_clients[2:], other).added == ["org/client-2"]


def test_the_ledger_names_the_global_that_was_folded_onto(thin_clients: list[Path], tmp_path: Path) -> None:
    onto = tmp_path / "global"
    assert fold(thin_clients[:1], onto).ledger.parent is None
    weights = digests(onto)[FILES[0]]
    assert fold(thin_clients[1:], onto).ledger.parent == f"sha256:{weights}"
    assert f"* Folded onto an earlier global adapter: sha256:{weights}." in (onto / "README.md").read_text()


def test_an_id_that_is_in_from_somewhere_else_is_refused(thin_clients: list[Path], tmp_path: Path) -> None:
    onto = tmp_path / "global"
    fold(thin_clients, onto)
    thief = edited(thin_clients[1], tmp_path / "thief", client_id="org/client-0")
    renamed = edited(thin_clients[1], tmp_path / "other" / "client-0", client_id="org/nobody")
    before = digests(onto)
    for folder, reason in ((thief, "org/client-0 is in already, from client-0"), (renamed, "is in as org/client-0")):
        with pytest.raises(RefusedError, match=reason):
            fold([folder], onto)
    assert digests(onto) == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "svd"}, "--method is svd"),
        ({"dtype": "bf16"}, "--dtype is bf16"),
        ({"global_lr": 0.5}, "--global-lr is 0.5"),
        ({"rank": 4}, "--rank is 4"),
        ({"weights": "uniform"}, "weighted by examples"),
        ({"withdraw": ["org/client-0", "org/client-1"]}, "leave nobody"),
    ],
)
def test_options_that_contradict_the_global_are_refused(
    options: dict[str, Any], reason: str, thin_clients: list[Path], tmp_path: Path
) -> None:
    onto = tmp_path / "global"
    fold(thin_clients[:2], onto)
    before = digests(onto)
    with pytest.raises(UsageError, match=reason):
        fold([] if "withdraw" in options else thin_clients[2:], onto, **options)
    assert digests(onto) == before


def test_methods_that_need_all_clients_at_once_are_refused(thin_clients: list[Path], tmp_path: Path) -> None:
    for options in ({"method": "ties"}, {"method": "svd"}, {"method": "svd", "rank": "auto"}):
        with pytest.raises(UsageError, match=r"all clients at once|fixed --rank"):
            fold(thin_clients, tmp_path / "global", **options)
    aggregate(thin_clients, tmp_path / "ties", method="ties", screening=None)
    with pytest.raises(UsageError, match="cannot be folded"):
        fold(thin_clients, tmp_path / "ties")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda ledger: ledger["contributions"][0].update(weight=11.0), "sum of the weights"),
        (lambda ledger: ledger["contributions"][0].update(share=0.3), "shares"),
        (lambda ledger: ledger["contributions"][0].update(block_ranks={"*": 2}), "not as wide"),
        (lambda ledger: ledger["contributions"][0].update(block_ranks={"*": 1, "nowhere": 3}), "no low-rank module"),
        (lambda ledger: ledger["contributions"][0].update(claims={"r": 3}), "unknown entry"),
        (lambda ledger: ledger["contributions"][0].update(source="client-1"), "2 of them have the source"),
        (lambda ledger: ledger.update(method="fedavg"), "lora-merge.lock, method"),
    ],
)
def test_a_global_whose_files_contradict_each_other_is_refused(
    change: Callable[[dict[str, Any]], None], reason: str, thin_clients: list[Path], tmp_path: Path
) -> None:
    onto = tmp_path / "global"
    fold(thin_clients[:2], onto)
    ledger = json.loads((onto / "aggregation.json").read_text())
    change(ledger)
    (onto / "aggregation.json").write_text(json.dumps(ledger))
    with pytest.raises(RefusedError, match=reason):
        fold(thin_clients[2:], onto)


def test_somebody_elses_change_in_the_meantime_is_a_conflict_and_is_kept(
    thin_clients: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onto = tmp_path / "global"
    fold(thin_clients[:1], onto)
    merge = corridor.merge_modules

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.undo()
        fold(thin_clients[1:2], onto)
        return merge(*arguments)

    monkeypatch.setattr(corridor, "merge_modules", meanwhile)
    with pytest.raises(ConflictError):
        fold(thin_clients[2:], onto)
    same_as_one_merge(onto, thin_clients[:2], tmp_path / "one")


@pytest.mark.parametrize("there", [True, False], ids=["nothing new", "an arrival"])
def test_what_somebody_makes_at_another_output_in_the_meantime_is_a_conflict_and_is_kept(
    there: bool, thin_clients: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onto, output = tmp_path / "global", tmp_path / "other"
    fold(thin_clients[:2], onto)
    opened = corridor.opened_global

    def meanwhile(*arguments: Any) -> Any:
        aggregate(thin_clients[2:], output)
        return opened(*arguments)

    monkeypatch.setattr(corridor, "opened_global", meanwhile)
    with pytest.raises(ConflictError, match="other in the meantime"):
        fold(thin_clients[1 if there else 2 :][:1], onto, output=output)
    same_as_one_merge(output, thin_clients[2:], tmp_path / "one")


def test_by_force_the_first_merge_replaces_what_is_at_another_output(thin_clients: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "other"
    aggregate(thin_clients[2:], output)
    with pytest.raises(UsageError, match="exists already"):
        fold(thin_clients[:2], tmp_path / "new", output=output)
    with pytest.raises(UsageError, match="nobody"):  # an error of another kind is no conflict with what is there
        fold(thin_clients[:2], tmp_path / "new", output=output, force=True, weights={"nobody": 1.0})
    fold(thin_clients[:2], tmp_path / "new", output=output, force=True)
    same_as_one_merge(output, thin_clients[:2], tmp_path / "one")


def test_the_core_keeps_its_bound_and_stays_near_one_merge(tmp_path: Path) -> None:
    clients = [write_client(tmp_path / f"client-{i}", i, 48, 4, trained=True) for i in range(12)]
    folded, once, _ = truncated(tmp_path, clients, 3)
    assert folded <= 1.05 * once
    ledger = json.loads((tmp_path / "svd" / "aggregation.json").read_text())
    assert ledger["certificate"]["measured_by"] == "bound"
    assert folded <= ledger["certificate"]["whole"]["relative_error"] < 1


def test_a_bound_above_one_is_no_guarantee(tmp_path: Path) -> None:
    clients = [write_client(tmp_path / f"client-{i}", i, 48, 4) for i in range(30)]
    onto = tmp_path / "svd"
    for client in clients:
        result = fold([client], onto, **({} if onto.exists() else {"method": "svd", "rank": 2}))
    assert result.ledger.certificate.sentence().startswith("no guarantee")


def test_a_core_of_another_adapter_is_refused(tmp_path: Path) -> None:
    clients = [write_client(tmp_path / f"client-{i}", i, 48, 4) for i in range(3)]
    fold(clients[:2], tmp_path / "global", method="svd", rank=2)
    core = tmp_path / "global" / "aggregation_core.safetensors"
    save_file({**load_file(core), "layer.dropped": torch.tensor([-1.0])}, core)
    with pytest.raises(RefusedError, match="dropped"):
        fold(clients[2:], tmp_path / "global")


@pytest.mark.parametrize(("method", "options"), [("svd", {"rank": 2}), ("ffa", {})])
def test_who_is_in_a_mean_comes_out_by_a_merge_of_all_files(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    first = write_client(tmp_path / "client-0", 0, 24, 2)
    A = {name: value for name, value in load_file(first / FILES[0]).items() if "lora_A" in name}
    folders = [first, *(write_client(tmp_path / f"client-{i}", i, 24, 2) for i in (1, 2))]
    for folder in folders:
        save_file({**load_file(folder / FILES[0]), **A}, folder / FILES[0])
    onto = tmp_path / "global"
    for folder in folders:
        fold([folder], onto, **({} if onto.exists() else {"method": method, **options}))
    with pytest.raises(NotFoundError, match="Nothing was changed"):
        fold([], onto, withdraw=["client-1"])
    assert fold(folders, onto, withdraw=["client-1"]).again
    same_as_one_merge(onto, [folders[0], folders[2]], tmp_path / "one", method=method, **options)


def test_ffa_is_folded_to_the_mean(tmp_path: Path) -> None:
    folders = [write_client(tmp_path / f"client-{i}", i, 24, 2) for i in range(3)]
    A = {name: value for name, value in load_file(folders[0] / FILES[0]).items() if "lora_A" in name}
    for folder in folders:
        save_file({**load_file(folder / FILES[0]), **A}, folder / FILES[0])
        fold([folder], tmp_path / "global", method="ffa")
    assert error_of(tmp_path / "global", mean_of(folders)) < 1e-6
