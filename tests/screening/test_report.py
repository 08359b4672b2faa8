"""All problems of all clients come in one report: what config and header say, and what only the values show."""

import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_merge.aggregation.schedule import pool
from lora_merge.checkpoint import safetensors_file
from lora_merge.checkpoint.safetensors_file import SafetensorsFile, open_safetensors
from lora_merge.screening.measuring import value_problems
from tests.adapters import CONFIG, WEIGHTS, rewrite_json
from tests.cli.running import Run, lora_merge
from tests.cli.test_aggregate import LORA_A, client, poison

__all__ = ["lora_merge"]

LORA_B = LORA_A.replace("_A", "_B")
NOT_FINITE = "holds NaN or infinity"


@pytest.fixture
def three(tmp_path: Path) -> None:
    """Three sound clients, a to c."""
    for seed, name in enumerate("abc"):
        client(tmp_path / name, seed=seed)


def spoilt(folder: Path, *, seed: int = 7, width: int = 8) -> Path:
    """A client both of whose tensors hold a number that is none."""
    tensors = load_file(client(folder, seed=seed, width=width) / WEIGHTS)
    tensors[LORA_A][0, 0], tensors[LORA_B][-1, -1] = math.inf, math.nan
    save_file(tensors, folder / WEIGHTS)
    return folder


def refused(lora_merge: Run, *arguments: str) -> Any:
    """The error's record of a command that ends in exit code 3."""
    code, out, _ = lora_merge(*arguments, "--json")
    assert code == 3
    return json.loads(out)["error"]


def told(error: Any) -> set[tuple[str, str]]:
    return {(each["client"], each["field"]) for each in error["problems"]}


@pytest.mark.usefixtures("three")
def test_what_reading_finds_is_told_with_what_the_config_says(lora_merge: Run, tmp_path: Path) -> None:
    spoilt(tmp_path / "n")
    rewrite_json(client(tmp_path / "f") / CONFIG, {"foo": 1})
    rewrite_json(poison(client(tmp_path / "g"), math.nan) / CONFIG, {"r": -3})
    error = refused(lora_merge, "aggregate", "[a-n]", "-o", "global")
    expected = {("org/n", LORA_A), ("org/n", LORA_B), ("f", "foo"), ("g", "r"), ("g", LORA_A)}
    assert told(error) == expected
    assert error["hint"] == "To merge the others without f, g, org/n: --skip-rejected."
    assert not (tmp_path / "global").exists()
    assert lora_merge("aggregate", "[a-n]", "-o", "global", "--skip-rejected")[0] == 0


@pytest.mark.usefixtures("three")
def test_what_reading_finds_is_told_with_who_does_not_fit_or_claims_anothers_id(
    lora_merge: Run, tmp_path: Path
) -> None:
    spoilt(tmp_path / "n")
    spoilt(tmp_path / "w", width=12)
    for name in "de":
        statement = client(tmp_path / name, seed=9) / "lora_merge.json"
        statement.write_text(statement.read_text().replace(f"org/{name}", "org/one"))
    poison(tmp_path / "e", math.inf)
    found = told(refused(lora_merge, "aggregate", "[a-w]", "-o", "global"))
    values = {("org/n", LORA_A), ("org/n", LORA_B), ("org/w", LORA_A), ("org/w", LORA_B), ("e", LORA_A)}
    assert found == values | {("org/w", "layer"), ("d", "client_id"), ("e", "client_id")}


@pytest.mark.usefixtures("three")
def test_what_reading_finds_is_told_with_a_dominant_count_and_both_ways_on(lora_merge: Run, tmp_path: Path) -> None:
    spoilt(tmp_path / "n")
    client(tmp_path / "d", num_examples=10**9)
    error = refused(lora_merge, "aggregate", "[a-n]", "-o", "global")
    assert told(error) == {("org/n", LORA_A), ("org/n", LORA_B), ("org/d", "num_examples")}
    assert "--allow-dominant" in error["hint"]
    assert "--skip-rejected" in error["hint"]


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize("how", [(), ("--method", "fedavg"), ("--robust", "median"), ("--clip", "3x")])
def test_of_values_alone_every_tensor_is_named_and_the_way_on_too(
    how: tuple[str, ...], lora_merge: Run, tmp_path: Path
) -> None:
    spoilt(tmp_path / "m")
    spoilt(tmp_path / "n", seed=8)
    error = refused(lora_merge, "aggregate", "[a-n]", "-o", "global", *how)
    assert told(error) == {(f"org/{name}", tensor) for name in "mn" for tensor in (LORA_A, LORA_B)}
    assert error["hint"] == "To merge the others without org/m, org/n: --skip-rejected."
    assert lora_merge("aggregate", "[a-n]", "-o", "global", *how, "--skip-rejected")[0] == 0
    left_out = json.loads(Path("global", "aggregation.json").read_text())["left_out"]
    assert [each["reason"].count(NOT_FINITE) for each in left_out] == [2, 2]


@pytest.mark.usefixtures("three")
def test_of_arrivals_too(lora_merge: Run, tmp_path: Path) -> None:
    assert lora_merge("aggregate", "[ab]", "-o", "global")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "global").iterdir()}
    spoilt(tmp_path / "n")
    client(tmp_path / "w", width=12)
    values = {("org/n", LORA_A), ("org/n", LORA_B)}
    assert told(refused(lora_merge, "aggregate", "n", "w", "--onto", "global")) >= {*values, ("org/w", "layer")}
    rewrite_json(client(tmp_path / "f") / CONFIG, {"foo": 1})
    error = refused(lora_merge, "aggregate", "n", "f", "--onto", "global")
    assert told(error) == {*values, ("f", "foo")}
    assert error["hint"] == "To merge the others without f, org/n: --skip-rejected."
    wide = client(tmp_path / "v", width=12)  # of arrivals that fit each other, and not who is in
    for name in "no":
        spoilt(tmp_path / f"{name}-wide", width=12)
    found = told(refused(lora_merge, "aggregate", "*-wide", wide.name, "--onto", "global"))
    assert {("org/n-wide", LORA_B), ("org/o-wide", LORA_B), ("org/v", "layer")} <= found
    assert {path.name: path.read_bytes() for path in (tmp_path / "global").iterdir()} == before


@pytest.mark.usefixtures("three")
def test_nobody_is_looked_at_who_is_excluded_or_not_on_the_allow_list(lora_merge: Run, tmp_path: Path) -> None:
    spoilt(tmp_path / "n")
    rewrite_json(client(tmp_path / "f") / CONFIG, {"foo": 1})
    for entry in ("n", "org/n"):
        error = refused(lora_merge, "aggregate", "[a-n]", "-o", "global", "--exclude", entry)
        assert told(error) == {("f", "foo")}
    (tmp_path / "allowed").write_text("a\nb\nc\nf\n")
    error = refused(lora_merge, "aggregate", "[a-n]", "-o", "global", "--allow-list", "allowed")
    assert told(error) == {("f", "foo"), ("n", "allow-list")}


@pytest.mark.usefixtures("three")
def test_where_nobody_is_refused_nothing_is_read_for_a_report(
    lora_merge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked_at(file: SafetensorsFile, name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(SafetensorsFile, "require_finite", looked_at)
    assert lora_merge("aggregate", "a", "b", "-o", "global", "--skip-rejected")[0] == 0
    assert lora_merge("aggregate", "c", "--onto", "global")[0] == 0
    rewrite_json(client(tmp_path / "f") / CONFIG, {"foo": 1})
    assert lora_merge("aggregate", "[a-f]", "--dry-run")[0] == 3  # which reads no tensor, whatever it refuses


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_tensor_is_looked_at_piece_by_piece_to_its_end(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "PIECE_BYTES", 16)
    tensors = {name: torch.ones(3, 7, dtype=getattr(torch, dtype)) for name in ("sound", "last")}
    tensors["last"][-1, -1] = math.inf
    save_file(tensors, tmp_path / WEIGHTS)
    with closing(open_safetensors(tmp_path / WEIGHTS)) as file, pool() as threads:
        assert len(list(file.pieces())) > 2 * len(tensors)
        assert [(each.field, each.reason) for each in value_problems("a", file, threads)] == [("last", NOT_FINITE)]
        with (tmp_path / WEIGHTS).open("r+b") as cut:
            cut.truncate(file.size - 1)
        cut_short = max(file.entries, key=lambda name: file.entries[name].offset)
        assert cut_short in [each.field for each in value_problems("a", file, threads)]


def test_a_refused_file_that_would_take_long_is_not_read_for_more(
    lora_merge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite_json(spoilt(tmp_path / "d") / CONFIG, {"foo": 1})
    both = refused(lora_merge, "aggregate", "[a-d]", "-o", "global")
    monkeypatch.setattr("lora_merge.screening.report.MOST_READ", 100)
    assert len(refused(lora_merge, "aggregate", "[a-d]", "-o", "global")["problems"]) == len(both["problems"]) - 2
