"""`lora-merge inspect`: a table before merging, of every adapter, the refused ones too."""

import io
import json
import operator
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_merge.cli.heat_map import ASCII, BLOCKS, heat_map, shades
from tests import models
from tests.adapters import ATTENTION, Kind, clients, edited
from tests.cli.running import Run, lora_merge
from tests.cli.test_aggregate import LORA_A, client, poison
from tests.cli.test_screening import LORA_B, boosted, changed, rotated
from tests.conftest import Federations
from tests.dense import base_weights, merged_weights

__all__ = ["lora_merge"]

SEEDS = {"a": 0, "b": 1, "c": 2, "d": 3}


@pytest.fixture
def four(tmp_path: Path) -> None:
    for name, seed in SEEDS.items():
        client(tmp_path / name, seed=seed, num_examples=100)


def inspected(lora_merge: Run, *arguments: str, code: int = 0) -> Any:
    found, out, _ = lora_merge("inspect", *arguments, "--json")
    assert found == code
    return json.loads(out)


def delta(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    return (tensors[LORA_B] @ tensors[LORA_A]).double()


@pytest.mark.usefixtures("four")
def test_its_numbers_are_those_of_the_dense_updates(lora_merge: Run, tmp_path: Path) -> None:
    found = inspected(lora_merge, "[abcd]")
    deltas = torch.stack([delta(tmp_path / name) for name in SEEDS])
    mean = deltas.mean(dim=0)
    unit = deltas.flatten(1) / deltas.flatten(1).norm(dim=1, keepdim=True)
    torch.testing.assert_close(torch.tensor(found["cosines"]).double(), unit @ unit.mT, atol=1e-5, rtol=0)
    for index, each in enumerate(found["clients"]):
        own, others = deltas[index], (deltas.sum(dim=0) - deltas[index]) / 3
        values = torch.linalg.svdvals(own).square()
        assert each["norm"] == pytest.approx(float(own.norm()), rel=1e-5)
        assert each["cosine_to_mean"] == pytest.approx(float((own * mean).sum() / own.norm() / mean.norm()), abs=1e-5)
        assert each["cosine_to_others"] == pytest.approx(
            float((own * others).sum() / own.norm() / others.norm()), abs=1e-5
        )
        assert each["influence"] == pytest.approx(float((mean - others).norm() / mean.norm()), rel=1e-5)
        assert each["top_share"] == pytest.approx(float(values[0] / values.sum()), rel=1e-5)
        assert each["effective_rank"] == pytest.approx(float(values.sum() ** 2 / values.square().sum()), rel=1e-5)
    assert found["mean_norm"] == pytest.approx(float(mean.norm()), rel=1e-5)
    assert found["would_stop"] is False


@pytest.mark.usefixtures("four")
def test_every_refused_adapter_is_named_and_the_others_are_shown(lora_merge: Run, tmp_path: Path) -> None:
    poison(tmp_path / "b", float("nan"))
    (tmp_path / "c" / "adapter_model.safetensors").write_bytes(b"no")
    client(tmp_path / "e", width=12, num_examples=100)
    found = inspected(lora_merge, "[a-e]", code=3)
    assert [each["client_id"] for each in found["clients"]] == ["org/a", "org/d"]
    assert sorted(each["source"] for each in found["left_out"]) == ["b", "c", "e"]
    assert len(found["refused"]) == 3
    code, out, _ = lora_merge("inspect", "[a-e]")
    assert code == 3
    for line in ("left out: b: ", "left out: c: ", "left out: e: layer: is linear 12x12"):
        assert line in out


@pytest.mark.usefixtures("four")
def test_where_all_are_refused_the_record_says_so_as_where_some_are(lora_merge: Run, tmp_path: Path) -> None:
    poison(tmp_path / "a", float("nan"))
    (tmp_path / "b" / "adapter_config.json").write_text("{}")
    found = inspected(lora_merge, "[abcd]", "--exclude", "c", "--exclude", "d", code=3)
    assert (found["clients"], found["cosines"], found["would_stop"]) == ([], [], True)
    assert {(each["client"], each["field"]) for each in found["refused"]} == {("org/a", LORA_A), ("b", "peft_type")}
    assert [each["source"] for each in found["left_out"]] == ["a", "b", "c", "d"]
    code, out, err = lora_merge("inspect", "a", "b")
    assert (code, err) == (3, "")
    assert out.startswith("clients  0\n")
    for line in (f"left out: a: {LORA_A}: holds NaN", "left out: b: peft_type: must be LORA"):
        assert line in out
    assert lora_merge("inspect", "a", "b", "-q") == (3, "", "")
    assert lora_merge("inspect", "c", "--exclude", "c")[0] == 2


@pytest.mark.usefixtures("four")
def test_what_would_stop_a_merge_is_said_and_ends_in_3(lora_merge: Run, tmp_path: Path) -> None:
    changed(tmp_path / "a", boosted)
    statement = tmp_path / "b" / "lora_merge.json"
    statement.write_text(statement.read_text().replace("100", "90000"))
    found = inspected(lora_merge, "[abcd]", code=3)
    assert [len(each["stops"]) for each in found["clients"]] == [1, 1, 0, 0]
    assert lora_merge("inspect", "[abcd]", "-q")[:2] == (3, "c\nd\n")
    code, out, _ = lora_merge("inspect", "[abcd]", "--exclude", "[ab]")
    assert code == 0
    assert "left out: a: excluded by [ab]" in out


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-15, 1e15, 1e30, 1e37])
def test_an_update_of_any_size_is_judged_and_its_spectrum_has_its_shape(
    size: float, lora_merge: Run, tmp_path: Path
) -> None:
    spectrum = operator.itemgetter("top_share", "effective_rank")
    before = [spectrum(each) for each in inspected(lora_merge, "[abcd]")["clients"]]
    changed(tmp_path / "a", lambda tensors: tensors.update({name: size * each for name, each in tensors.items()}))
    code = 3 if size > 1 else 0
    found = inspected(lora_merge, "[abcd]", code=code)["clients"]
    near = 1e-5 if size > 1e-38 else 0.1  # fp32 keeps few digits of what is smaller
    assert [spectrum(each) for each in found] == [pytest.approx(each, rel=near) for each in before]
    assert lora_merge("aggregate", "[abcd]", "-o", "global")[0] == code
    assert lora_merge("check", "a")[0] == 0


@pytest.mark.usefixtures("four")
def test_copies_and_sign_flips_are_flagged(lora_merge: Run, tmp_path: Path) -> None:
    client(tmp_path / "e", seed=0, num_examples=100)
    changed(client(tmp_path / "f", seed=0, num_examples=100), rotated)
    changed(client(tmp_path / "g", seed=0, num_examples=100), lambda tensors: tensors[LORA_B].neg_())
    found = {each["client_id"]: " ".join(each["flags"]) for each in inspected(lora_merge, "[a-g]")["clients"]}
    assert "has the same weights as org/a" in found["org/e"]
    assert "nearly the update of org/a (cosine 1.00000)" in found["org/f"]
    assert "points away from the others' mean" in found["org/g"]
    assert found["org/c"] == ""


def test_without_counts_every_client_weighs_the_same(lora_merge: Run, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        client(tmp_path / name, seed=seed, num_examples=100 if name == "a" else None)
    found = inspected(lora_merge, "a", "b")
    assert [each["share"] for each in found["clients"]] == [0.5, 0.5]
    assert "states no num_examples" in found["clients"][0]["flags"][0]


@pytest.mark.usefixtures("four")
def test_a_client_without_a_count_hides_no_inflated_one(lora_merge: Run, tmp_path: Path) -> None:
    client(tmp_path / "huge", seed=3, num_examples=10**18)
    client(tmp_path / "silent", seed=4, num_examples=None)
    found = inspected(lora_merge, "[abc]", "huge", "silent", code=3)
    assert [each["client_id"] for each in found["clients"] if each["stops"]] == ["org/huge"]
    assert {each["share"] for each in found["clients"]} == {0.2}
    assert "1 of 5 clients states no num_examples: all weigh the same here" in found["warnings"][0]
    assert not any("weigh the same" in line for line in inspected(lora_merge, "[abc]")["warnings"])


def test_a_merged_adapter_is_shown_as_one(lora_merge: Run, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        client(tmp_path / name, seed=seed)
    assert lora_merge("aggregate", "a", "b", "-o", "c", "-q")[0] == 0
    code, out, _ = lora_merge("inspect", "a", "b", "c")
    assert code == 3
    assert "stops the merge: c: is a merged adapter of 2 clients\n" in out
    code, out, err = lora_merge("inspect", "[abc]", "--json")
    assert (code, [each["client_id"] for each in json.loads(out)["clients"]]) == (0, ["org/a", "org/b"])
    assert "[abc] leaves out c (a merged adapter)." in err
    (tmp_path / "c" / "aggregation.json").write_text("{}")
    assert "stops the merge: c: aggregation.json, " in lora_merge("inspect", "c")[1]


@pytest.mark.usefixtures("four")
def test_the_table_fits_80_columns_when_piped(lora_merge: Run, tmp_path: Path) -> None:
    client(tmp_path / ("long-" * 12), seed=9, num_examples=100)
    code, out, _ = lora_merge("inspect", "[abcd]", "long*")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out
    assert "100  " in out


def test_hostile_names_reach_no_terminal(lora_merge: Run, tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "\x1b[31m[bold]b\nrefused: c")):
        client(tmp_path / name, seed=seed, num_examples=None)
    code, out, err = lora_merge("inspect", "*")
    assert code == 0
    assert "\x1b" not in out + err
    assert "[bold]" in out
    assert not any(line.startswith("refused") for line in out.splitlines())


def test_nothing_there_is_not_found_and_what_there_is_is_named(lora_merge: Run, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    code, _, err = lora_merge("inspect", "none-*")
    assert (code, err.splitlines()[1]) == (4, f"hint: No folder in {tmp_path} holds an adapter.")
    for name in "abcd":
        client(tmp_path / name)
    assert "hint: Adapters there: a, b, c and 1 more." in lora_merge("inspect", "zzz*")[2]
    client(tmp_path / "none-1")
    assert "hint: Did you mean none-1?" in lora_merge("inspect", "nnoe")[2]


@pytest.mark.usefixtures("four")
def test_ids_may_come_from_standard_input(lora_merge: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("# ours\nb\n\nc"))
    assert lora_merge("inspect", "a", "-", "-q")[:2] == (0, "a\nb\nc\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("# ours\r\nb\r\n\r\nc\r\n"))  # as Windows ends lines
    assert lora_merge("inspect", "a", "-", "-q")[:2] == (0, "a\nb\nc\n")
    monkeypatch.setattr("sys.stdin", None)  # as of `lora-merge inspect - <&-`
    assert lora_merge("inspect", "-")[::2] == (2, "error: Standard input is closed, and - reads sources from it.\n")


NAMES = ["#hash", " ", " b", "trail ", "~tilde", "~root", "-", "*star", "a b", "né", "x@main", "hf:"]


def test_quiet_prints_every_printable_name_as_standard_input_takes_it(
    lora_merge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(NAMES):
        client(tmp_path / name, seed=seed, num_examples=None)
    code, out, _ = lora_merge("inspect", "./*", "-q")
    assert (code, len(out.splitlines())) == (0, len(NAMES))
    monkeypatch.setattr("sys.stdin", io.StringIO(out))
    assert lora_merge("inspect", "-", "-q")[:2] == (0, out)


@pytest.mark.parametrize("command", ["check", "inspect", "verify", "export"])
def test_a_tilde_that_names_nobody_is_a_name_like_any_other(command: str, lora_merge: Run, tmp_path: Path) -> None:
    more = ("--base", "~nosuch/base", "-o", "out") if command == "export" else ()
    assert lora_merge(command, "~nosuch/x", *more)[0] == 4
    client(tmp_path / "~nosuch" / "x")
    assert lora_merge(command, "~nosuch/x", *more)[0] == {"check": 0, "inspect": 0}.get(command, 4)


def test_a_quoted_pattern_may_begin_with_the_home(
    lora_merge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    client(tmp_path / "home" / "a")
    assert lora_merge("inspect", "~/*", "-q")[:2] == (0, f"{tmp_path / 'home' / 'a'}\n")


@pytest.mark.usefixtures("four")
def test_another_path_of_an_adapter_may_be_excluded(lora_merge: Run, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to("b")
    code, _, err = lora_merge("inspect", "./*")
    assert (code, err) == (2, "error: linked is given twice, as b too.\n")
    assert lora_merge("inspect", "./*", "--exclude", "linked", "-q")[:2] == (0, "a\nb\nc\nd\n")
    made = lora_merge("aggregate", "./*", "--exclude", "linked", "-o", "global", "--json")[1]
    assert [each["source"] for each in json.loads(made)["contributions"]] == list("abcd")
    assert [each["source"] for each in json.loads(made)["left_out"]] == ["linked"]


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize("command", [("inspect",), ("aggregate", "--dry-run")])
def test_what_quiet_prints_names_the_same_adapters_to_the_next_command(
    command: tuple[str, ...], lora_merge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / name).rename(tmp_path / "in" / name)
    code, out, _ = lora_merge(*command, "in/*", str(tmp_path / "c"), "-q")
    assert (code, out.splitlines()) == (0, ["in/a", "in/b", str(tmp_path / "c")])
    monkeypatch.setattr("sys.stdin", io.StringIO(out))
    found = json.loads(lora_merge(*command, "-", "--json")[1])["clients"]
    assert [(each["source"], each["place"]) for each in found] == [*zip("abc", out.splitlines(), strict=True)]


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize("command", ["inspect", "aggregate", "check", "watch"])
def test_an_empty_source_is_not_the_folder_one_is_in(command: str, lora_merge: Run, tmp_path: Path) -> None:
    more = {"aggregate": ("-o", "global"), "watch": ("--onto", "global", "--until", "1")}.get(command, ())
    for path in (tmp_path / "a").iterdir():
        path.rename(tmp_path / path.name)
    code, out, err = lora_merge(command, "", *more)
    assert (code, out) == (2, "")
    assert "A source is empty." in err


def test_watch_takes_no_standard_input(lora_merge: Run) -> None:
    code, _, err = lora_merge("watch", "-", "--onto", "global")
    assert code == 2
    assert "it takes none from standard input" in err


def test_the_map_has_a_character_for_each_step() -> None:
    lines = list(heat_map(["a", "bb"], [[1.0, -0.5], [0.3, 0.0]], BLOCKS))
    assert lines[1:] == [" a |██--|", "bb |░░  |"]
    assert list(heat_map(["a"], [[0.7]], ASCII))[1] == "a |**|"
    assert "too wide" in next(heat_map(["a"] * 57, [[0.0] * 57] * 57, BLOCKS))
    assert max(map(len, heat_map(["x" * 20] * 56, [[0.5] * 56] * 56, BLOCKS))) <= 80


def test_blocks_are_only_for_streams_that_can_show_them() -> None:
    assert shades("utf-8") == shades("UTF8") == BLOCKS
    assert shades("ascii") == shades("iso8859-1") == shades(None) == ASCII


MIXED = Kind("one DoRA among plain", models.llama, clients({}, {}, {}, {"use_dora": True}, common=ATTENTION))
SAVED = Kind(
    "two of four saved the head",
    models.llama,
    clients({}, {}, *[{"modules_to_save": ["lm_head"]}] * 2, common=ATTENTION),
)


def test_a_dora_client_leaves_the_others_measured(lora_merge: Run, federations: Federations) -> None:
    made = federations(MIXED)
    folders = [str(folder) for folder in made.clients]
    alone, found = inspected(lora_merge, *folders[:3]), inspected(lora_merge, *folders)
    assert [each["norm"] for each in found["clients"]] == [*(each["norm"] for each in alone["clients"]), None]
    assert min(each["norm"] for each in alone["clients"]) > 0
    assert found["cosines"] == [*([*row, None] for row in alone["cosines"]), [None] * 4]
    for name in ("cosine_to_mean", "cosine_to_others", "influence"):
        assert {each[name] for each in found["clients"]} == {None}, name
    assert found["mean_norm"] is None
    assert all(module["norm"] is None for module in found["clients"][3]["modules"].values())
    assert any("aggregate needs --base" in line for line in found["warnings"])
    code, out, _ = lora_merge("inspect", *folders)
    assert code == 0
    assert "'?' not measured" in out
    assert "not measured, for want of the base model: " in out
    assert "0.00" not in out


def test_beside_the_base_a_dora_client_and_whole_tensors_are_measured(
    lora_merge: Run, federations: Federations
) -> None:
    for kind in (MIXED, SAVED):
        made = federations(kind)
        found = inspected(lora_merge, *map(str, made.clients), "--base", str(made.base))
        start = base_weights(kind.build)
        for each, folder in zip(found["clients"], made.clients, strict=True):
            moved = merged_weights(kind, folder)
            size = sum(float((moved[name] - value).square().sum()) for name, value in start.items()) ** 0.5
            assert each["norm"] == pytest.approx(size, rel=1e-4)
            assert each["influence"] is not None
        assert found["not_measured"] == []


@pytest.mark.parametrize("flag", [[], ["-q"]])
def test_it_judges_with_the_base_that_aggregate_finds(
    flag: list[str], lora_merge: Run, federations: Federations, tmp_path: Path
) -> None:
    made = federations(SAVED)
    shutil.copytree(made.base, tmp_path / "tiny")
    for folder in made.clients:
        far = folder == made.clients[3]
        edited(
            folder,
            tmp_path / folder.name,
            tensors=lambda t, far=far: {k: v + 1e4 if far and "lm_head" in k else v for k, v in t.items()},
            config={"base_model_name_or_path": "./tiny"},
        )
    code, _, err = lora_merge("aggregate", "client-*", "-o", "global", *flag)
    assert code == 3
    assert "org/client-3: update: is more than" in err
    judged, out, talk = lora_merge("inspect", "client-*", *flag)
    assert judged == 3
    said = "The base model ./tiny, which the adapters name, is read from tiny (another: --base)."
    assert (said in err, said in talk) == ((False, False) if flag else (True, True))
    if not flag:
        assert "stops the merge: org/client-3: update is more than" in out
    assert inspected(lora_merge, "client-*", code=3)["not_measured"] == []
