"""What stops a merge of strangers' adapters, what the user can do about it, and what is written down of that."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.running import Run, lora_merge
from tests.cli.test_aggregate import LORA_A, client, poison

__all__ = ["lora_merge"]

LORA_B = LORA_A.replace("_A", "_B")
ESCAPE = "\x1b[31m"


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """`folder` with other tensors."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def boosted(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LORA_B] *= 100


def rotated(tensors: dict[str, torch.Tensor]) -> None:
    R = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    tensors[LORA_A], tensors[LORA_B] = R.mT @ tensors[LORA_A], 0.5 * tensors[LORA_B] @ R


@pytest.fixture
def four(tmp_path: Path) -> None:
    """Four clients of 100 examples, a to d."""
    for seed, name in enumerate("abcd"):
        client(tmp_path / name, seed=seed, num_examples=100)


def ledger(folder: str = "global") -> Any:
    return json.loads(Path(folder, "aggregation.json").read_text())


def weights(folder: str = "global") -> dict[str, float]:
    return {each["client_id"]: each["weight"] for each in ledger(folder)["contributions"]}


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--skip-rejected",)])
def test_a_dominant_count_stops_the_merge_and_nothing_is_written(
    more: tuple[str, ...], lora_merge: Run, tmp_path: Path
) -> None:
    client(tmp_path / "e", num_examples=10**18)
    code, out, err = lora_merge("aggregate", "[abcde]", "-o", "global", *more)
    assert (code, out) == (3, "")
    assert "org/e: num_examples: states 1e+18" in err
    for way in ("--cap-examples 4x", "--allow-dominant", "--weights"):
        assert way in err
    assert not (tmp_path / "global").exists()


@pytest.mark.usefixtures("four")
def test_the_ways_past_a_dominant_count(lora_merge: Run, tmp_path: Path) -> None:
    client(tmp_path / "e", num_examples=1000)
    rest = {f"org/{name}": 100.0 for name in "abcd"}
    run = ("aggregate", "[abcde]", "--force", "-o", "global")
    assert lora_merge(*run, "--cap-examples", "250")[0] == 0
    assert weights() == {**rest, "org/e": 250}
    assert ledger()["weighting"] == "examples, at most 250 each"
    assert lora_merge(*run, "--cap-examples", "4x")[0] == 0
    assert weights() == {**rest, "org/e": 400}
    code, _, err = lora_merge(*run, "--cap-examples", "5.5x")
    assert code == 3
    assert "states 1000 and counts as 550: 5.5 times the median of 100, 58% of all" in err
    assert lora_merge(*run, "--allow-dominant")[0] == 0
    assert weights() == {**rest, "org/e": 1000}
    assert ledger()["waved_through"] == [
        "org/e: num_examples: states 1000: 10 times the median of 100, 71% of all (--allow-dominant)"
    ]
    assert lora_merge("verify", "global", "[abcde]")[0] == 0


@pytest.mark.usefixtures("four")
def test_weights_that_the_user_gives_are_neither_judged_nor_capped(lora_merge: Run, tmp_path: Path) -> None:
    client(tmp_path / "e", num_examples=10**18)
    (tmp_path / "w.json").write_text(json.dumps({**dict.fromkeys("abcd", 1), "e": 1000}))
    assert lora_merge("aggregate", "[abcde]", "-o", "global", "--weights", "w.json")[0] == 0
    assert weights()["org/e"] == 1000
    code, _, err = lora_merge("aggregate", "[abcde]", "-o", "other", "--weights", "w.json", "--cap-examples", "5x")
    assert code == 2
    assert "not touched" in err


@pytest.mark.usefixtures("four")
def test_a_boosted_update_stops_the_merge_and_nothing_is_written(lora_merge: Run, tmp_path: Path) -> None:
    changed(tmp_path / "d", boosted)
    code, out, err = lora_merge("aggregate", "[abcd]", "-o", "global")
    assert (code, out) == (3, "")
    assert "org/d: update: has the norm" in err
    for way in ("--clip 3x", "--exclude", "--allow-outliers"):
        assert way in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d"]
    assert lora_merge("aggregate", "[abcd]", "-o", "global", "--exclude", "d")[0] == 0
    assert ledger()["left_out"] == [{"source": "d", "reason": "excluded by d"}]
    assert lora_merge("aggregate", "[abcd]", "-o", "let-in", "--allow-outliers")[0] == 0
    assert "(--allow-outliers)" in ledger("let-in")["waved_through"][0]
    assert lora_merge("verify", "let-in", "[abcd]")[0] == 0


@pytest.mark.usefixtures("four")
def test_a_dry_run_says_that_it_judges_no_update(lora_merge: Run, tmp_path: Path) -> None:
    changed(tmp_path / "d", boosted)
    code, _, err = lora_merge("aggregate", "[abcd]", "--dry-run")
    assert code == 0
    assert "No tensor was read: updates that are far too large" in err
    for silent in ("-q", "--json"):
        assert "No tensor" not in lora_merge("aggregate", "[abcd]", "--dry-run", silent)[2]


@pytest.mark.usefixtures("four")
def test_the_bytes_of_a_merge_do_not_depend_on_screening(lora_merge: Run, tmp_path: Path) -> None:
    from lora_merge import aggregate

    assert lora_merge("aggregate", "[abcd]", "-o", "screened")[0] == 0
    aggregate(["a", "b", "c", "d"], "plain", screening=None)
    for name in ("adapter_model.safetensors", "lora-merge.lock", "adapter_config.json"):
        assert (tmp_path / "screened" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    norms = [each["norm"] for each in ledger("screened")["contributions"]]
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert norms[0] == pytest.approx(float((tensors[LORA_B] @ tensors[LORA_A]).norm()), rel=1e-5)


@pytest.mark.usefixtures("four")
def test_copies_are_warned_of_and_dropped_on_request(lora_merge: Run, tmp_path: Path) -> None:
    client(tmp_path / "e", seed=1, num_examples=100)  # as b
    changed(client(tmp_path / "f", seed=1, num_examples=100), rotated)
    code, _, err = lora_merge("aggregate", "[a-f]", "-o", "global")
    assert code == 0
    assert "warning: org/e has the same weights as org/b." in err
    assert "warning: org/f has nearly the update of org/b (cosine 1.00000)." in err
    assert lora_merge("aggregate", "[a-f]", "-o", "dropped", "--drop-duplicates")[0] == 0
    assert [each["source"] for each in ledger("dropped")["left_out"]] == ["e", "f"]
    assert lora_merge("aggregate", "[abcd]", "-o", "without")[0] == 0
    for name in ("adapter_model.safetensors", "lora-merge.lock"):
        assert (tmp_path / "dropped" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


@pytest.mark.usefixtures("four")
def test_refused_clients_are_gone_on_without_only_when_asked(lora_merge: Run, tmp_path: Path) -> None:
    poison(tmp_path / "b", float("nan"))
    client(tmp_path / "e", width=12, num_examples=100)
    (tmp_path / "c" / "adapter_config.json").write_text("{}")
    code, _, err = lora_merge("aggregate", "[a-e]", "-o", "global")
    assert code == 3
    assert "--skip-rejected" in err
    assert not (tmp_path / "global").exists()
    code, out, err = lora_merge("aggregate", "[a-e]", "-o", "global", "--skip-rejected")
    assert code == 0
    assert list(weights()) == ["org/a", "org/d"]
    assert {each["source"]: each["reason"].split(":")[0] for each in ledger()["left_out"]} == {
        "b": LORA_A,
        "c": "peft_type",
        "e": "layer",
    }
    for source in "bce":
        assert f"warning: {source} is left out: " in err
    assert "left out" in out
    assert lora_merge("verify", "global", "a", "d")[0] == 0


@pytest.mark.usefixtures("four")
def test_where_everybody_is_refused_there_is_nothing_to_go_on_with(lora_merge: Run, tmp_path: Path) -> None:
    for name in "abcd":
        poison(tmp_path / name, float("inf"))
    code, _, err = lora_merge("aggregate", "[abcd]", "-o", "global", "--skip-rejected")
    assert code == 3
    assert "4 problems in 4 inputs" in err
    assert "--skip-rejected" not in err


@pytest.mark.usefixtures("four")
def test_weights_may_name_who_is_left_out(lora_merge: Run, tmp_path: Path) -> None:
    poison(tmp_path / "b", float("nan"))
    (tmp_path / "w.json").write_text(json.dumps({"a": 1, "b": 2, "c": 3, "d": 4}))
    run = ("aggregate", "[abcd]", "-o", "global", "--weights", "w.json")
    assert lora_merge(*run, "--skip-rejected", "--exclude", "d")[0] == 0
    assert weights() == {"org/a": 1, "org/c": 3}


@pytest.mark.usefixtures("four")
def test_an_allow_list_lets_in_whom_it_names(lora_merge: Run, tmp_path: Path) -> None:
    (tmp_path / "allowed").write_text("\ufeff./a/\n# the hospitals\nb   # of the north\n[c]\norg/d\n\n")
    code, _, err = lora_merge("aggregate", "[abcd]", "-o", "global", "--allow-list", "allowed")
    assert code == 3
    assert "d: allow-list: is not on it" in err  # org/d is what it states, as anybody may
    assert lora_merge("aggregate", "[abcd]", "-o", "global", "--allow-list", "allowed", "--skip-rejected")[0] == 0
    assert list(weights()) == ["org/a", "org/b", "org/c"]


SPELLINGS = (
    "d",
    "./d/",
    "{here}/d",
    "../{here.name}/d",
    "b/../d",
    "linked/d",
    "linked/../{here.name}/d",
    "file://{here}/d",
)
PATTERNS = ("[d]", "{here}/[d]", "linked/[d]", "../*/[d]", "{here.parent}/**/[d]")


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize("entry", [*SPELLINGS, *PATTERNS])
@pytest.mark.parametrize("source", [*SPELLINGS, "[d]"])
def test_lists_mean_places_however_they_are_spelled(entry: str, source: str, lora_merge: Run, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(tmp_path)
    entry, source = entry.format(here=tmp_path), source.format(here=tmp_path)
    Path("allowed").write_text(f"{entry}\n")
    run = ("aggregate", "[abc]", source, "--dry-run", "--json")
    excluding = json.loads(lora_merge(*run, "--exclude", entry)[1])
    assert [each["client_id"] for each in excluding["clients"]] == ["org/a", "org/b", "org/c"]
    allowing = json.loads(lora_merge(*run, "--allow-list", "allowed", "--skip-rejected")[1])
    assert [each["client_id"] for each in allowing["clients"]] == ["org/d"]


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize(
    "entry", ["d", "[d]", "*", "evil/*", "./**/d", "x/d", "evil/x", "evil/x/d/d", "org/d", "b/../x/d"]
)
def test_an_allow_list_lets_in_no_other_folder_of_the_same_name(entry: str, lora_merge: Run, tmp_path: Path) -> None:
    client(tmp_path / "evil" / "x" / "d", seed=7)
    Path("allowed").write_text(f"{entry}\n")
    admitted = lora_merge("aggregate", "evil/x/d", "--dry-run", "--allow-list", "allowed")[0] == 0
    assert admitted == (entry == "./**/d")


@pytest.mark.usefixtures("four")
def test_a_folder_whose_name_looks_like_a_pattern_stands_for_itself(lora_merge: Run, tmp_path: Path) -> None:
    client(tmp_path / "[abcd]", seed=7, num_examples=None)
    Path("allowed").write_text("[abcd]\n")
    run = ("aggregate", "--dry-run", "--weights", "uniform", "--allow-list", "allowed")
    assert lora_merge(*run, "./[abcd]")[0] == 0
    assert lora_merge(*run, "a")[0] == 3


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--exclude", "nobody"), 2, "--exclude nobody is none of the sources"),
        (("--exclude", "*"), 2, "Every adapter is excluded"),
        (("--allow-list", "no-such-file"), 4, "No such allow-list"),
        (("--allow-list", "a/lora_merge.json"), 3, "is not on it"),
        (("--allow-list", "empty"), 2, "lists nobody"),
        (("--allow-list", "a"), 2, "The allow-list a is a folder."),
        (("--cap-examples", "lots"), 2, "--cap-examples must be a number from"),
    ],
)
def test_a_wrong_choice_is_said(
    arguments: tuple[str, ...], code: int, said: str, lora_merge: Run, tmp_path: Path
) -> None:
    (tmp_path / "empty").write_text("# nobody\n")
    found, _, err = lora_merge("aggregate", "[abcd]", "-o", "global", *arguments)
    assert found == code
    assert said in err
    assert not (tmp_path / "global").exists()


@pytest.mark.usefixtures("four")
def test_an_exclusion_may_be_a_path_a_client_id_or_a_pattern(lora_merge: Run) -> None:
    for entry, left in (("./d/", "abc"), ("org/d", "abc"), ("[cd]", "ab"), ("org/*[cd]", "ab")):
        assert lora_merge("aggregate", "[abcd]", "-o", "global", "--force", "--exclude", entry)[0] == 0
        assert list(weights()) == [f"org/{name}" for name in left]


@pytest.mark.usefixtures("four")
def test_an_exclusion_that_is_a_path_means_no_other_folder_of_that_name_and_no_client_id(
    lora_merge: Run, tmp_path: Path
) -> None:
    statement = tmp_path / "c" / "lora_merge.json"
    statement.write_text(statement.read_text().replace("org/c", "d"))
    client(tmp_path / "e" / "d", seed=7)
    (tmp_path / "e" / "d" / "lora_merge.json").write_text(statement.read_text().replace('"d"', '"org/e"'))
    run = ("aggregate", "[abc]", "./e/d", "-o", "global", "--force")
    for entry in ("./d", "./[d]", "../*/d"):
        code, _, err = lora_merge(*run, "--exclude", entry)
        assert (code, err) == (2, f"error: --exclude {entry} is none of the sources or client ids.\n")
        assert lora_merge(*run, "d", "--exclude", entry)[0] == 0
        assert list(weights()) == ["d", "org/a", "org/b", "org/e"]
    assert lora_merge(*run, "--exclude", "./e/d")[0] == 0
    assert list(weights()) == ["d", "org/a", "org/b"]


@pytest.mark.usefixtures("four")
def test_a_record_of_who_is_excluded_by_a_path_does_not_hold_it(lora_merge: Run, tmp_path: Path) -> None:
    for entry in (f"{tmp_path}/d", f"file://{tmp_path}/d", f"{tmp_path}/[d]"):
        assert lora_merge("aggregate", "[abcd]", "-o", "global", "--force", "--exclude", entry)[0] == 0
        assert ledger()["left_out"] == [{"source": "d", "reason": "excluded by its path"}]


@pytest.mark.usefixtures("four")
def test_two_sources_that_claim_one_id_are_both_refused(lora_merge: Run, tmp_path: Path) -> None:
    statement = tmp_path / "d" / "lora_merge.json"
    statement.write_text(statement.read_text().replace("org/d", "org/a"))
    code, _, err = lora_merge("aggregate", "[abcd]", "-o", "global")
    assert code == 3
    assert "a: client_id: org/a is claimed by d too" in err
    assert "d: client_id: org/a is claimed by a too" in err
    assert lora_merge("aggregate", f"{tmp_path}/[abcd]", "-o", "global", "--skip-rejected")[0] == 0
    assert list(weights()) == ["org/b", "org/c"]  # nobody knows whose it is
    assert str(tmp_path) not in Path("global", "aggregation.json").read_text()


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize(
    ("claimed", "ways"),
    [("org/a", ["--exclude a", "--exclude d"]), ("a", ["--exclude d"])],  # --exclude a leaves out whoever claims `a`
)
def test_who_claims_an_id_too_is_excluded_as_the_hint_says(
    claimed: str, ways: list[str], lora_merge: Run, tmp_path: Path
) -> None:
    for name in "ad":
        statement = tmp_path / name / "lora_merge.json"
        statement.write_text(statement.read_text().replace(f"org/{name}", claimed))
    err = lora_merge("aggregate", "[abcd]", "-o", "global")[2]
    assert re.findall(r"--exclude \w", err) == ways
    assert "To merge the others without a, d: --skip-rejected." in err
    for way in ways:
        assert lora_merge("aggregate", "[abcd]", "-o", "global", "--force", *way.split())[0] == 0
        assert sorted(weights()) == sorted(["org/b", "org/c", claimed])


@pytest.mark.usefixtures("four")
def test_a_merged_adapter_is_a_client_only_where_the_user_says_so(lora_merge: Run) -> None:
    assert lora_merge("aggregate", "a", "b", "-o", "half", "-q")[0] == 0
    given = [word for name, n in {"half": 200, "c": 100, "d": 100}.items() for word in ("--weight", f"{name}={n}")]
    run = ("aggregate", "half", "c", "d", "-o", "global", *given)
    code, _, err = lora_merge(*run)
    assert code == 3
    assert "--onto half." in err
    assert "--allow-merged" in err
    assert lora_merge(*run, "--allow-merged")[0] == 0
    assert weights() == {"half": 200, "org/c": 100, "org/d": 100}
    assert lora_merge("verify", "global", "half", "c", "d")[0] == 0


def test_a_strangers_name_reaches_neither_the_terminal_nor_the_ledger_as_it_is(lora_merge: Run, tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b", f"{ESCAPE}c\nerror: no")):
        client(tmp_path / name, seed=seed, num_examples=None)
    poison(tmp_path / f"{ESCAPE}c\nerror: no", float("nan"))
    arguments = ("aggregate", "a", "b", f"{ESCAPE}c*", "-o", "global", "--weights", "uniform", "--skip-rejected")
    code, out, err = lora_merge(*arguments)
    assert code == 0
    assert "\x1b" not in out + err + Path("global", "README.md").read_text()
    assert ledger()["left_out"][0]["source"] == "\\x1b[31mc\\nerror: no"
    assert not any(line.startswith("error:") for line in err.splitlines())
