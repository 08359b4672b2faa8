"""`aggregate --onto --dry-run` says what a fold would do, and writes nothing."""

import json
from pathlib import Path

from tests.cli.running import Run, lora_merge
from tests.conftest import digests
from tests.folds import write_client

__all__ = ["lora_merge"]  # a fixture
ONTO = ("--onto", "global", "--dry-run", "--json")


def test_a_plan_names_who_is_in_who_is_new_and_who_is_replaced(lora_merge: Run, tmp_path: Path) -> None:
    for i, name in enumerate("abc"):
        write_client(tmp_path / name, i, 24, 2)
    write_client(tmp_path / "again" / "b", 7, 24, 2)
    assert lora_merge("aggregate", "a", "b", "--onto", "global")[0] == 0
    before = digests(tmp_path / "global")
    code, out, err = lora_merge("aggregate", "a", "again/b", "c", *ONTO)
    assert code == 0, err
    plan = json.loads(out)
    assert [plan[name] for name in ("known", "added", "replaced", "again")] == [["org/a"], ["org/c"], ["org/b"], None]
    plan = json.loads(lora_merge("aggregate", *ONTO, "--withdraw", "org/a")[1])
    assert (plan["withdrawn"], plan["to_download"]) == (["org/a"], 0)
    assert not any(
        json.loads(lora_merge("aggregate", "a", "b", *ONTO)[1])[name] for name in ("added", "replaced", "again")
    )
    code, out, _ = lora_merge("aggregate", "a", "c", *ONTO[:3])
    assert code == 0
    assert "org/c (weight 3)" in out
    assert "far too large" in lora_merge("aggregate", "a", "c", *ONTO[:3])[2]
    assert digests(tmp_path / "global") == before


def test_a_plan_says_whose_files_are_needed_and_gone(lora_merge: Run, tmp_path: Path) -> None:
    for i, name in enumerate("abc"):
        write_client(tmp_path / name, i, 24, 2)
    assert lora_merge("aggregate", "a", "b", "--onto", "global", "--method", "svd", "--rank", "2")[0] == 0
    plan = json.loads(lora_merge("aggregate", *ONTO, "--withdraw", "org/a")[1])
    assert "taken out of a mean" in plan["again"]
    assert "not by their paths" in plan["gone"]


def test_a_plan_onto_nothing_is_exit_4(lora_merge: Run, tmp_path: Path) -> None:
    write_client(tmp_path / "a", 0, 24, 2)
    code, out, _ = lora_merge("aggregate", "a", *ONTO)
    assert (code, json.loads(out)["error"]["message"].endswith("yet.")) == (4, True)
    assert not (tmp_path / "global").exists()


def test_with_nothing_new_an_output_is_said_to_be_a_copy(lora_merge: Run, tmp_path: Path) -> None:
    write_client(tmp_path / "a", 0, 24, 2)
    assert lora_merge("aggregate", "a", "--onto", "global")[0] == 0
    code, out, _ = lora_merge("aggregate", "a", "--onto", "global", "--output", "other")
    assert code == 0
    assert "other is a copy of global." in out
    assert digests(tmp_path / "other") == digests(tmp_path / "global")
    assert lora_merge("aggregate", "a", "--onto", "global", "--output", "third", "-q")[1] == "third\n"
    assert "global is as it was." in lora_merge("aggregate", "a", "--onto", "global")[1]


def test_a_clients_own_adapter_is_no_global_one_to_fold_onto(lora_merge: Run, tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        write_client(tmp_path / name, i, 24, 2)
    for more in ((), ("--dry-run",)):
        code, _, err = lora_merge("aggregate", "a", "--onto", "b", *more)
        assert code == 3
        assert "aggregation.json: is not there, so this is no global adapter, but at best a client's own" in err
        assert "hint: `lora-merge aggregate SOURCES --output GLOBAL` makes one" in err
