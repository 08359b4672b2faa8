"""`lora-merge verify`: the folders that it is given may hold more than the inputs, and anything else at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.adapters import rewrite_json
from tests.cli.running import Run, lora_merge
from tests.cli.test_aggregate import client, poison

__all__ = ["lora_merge"]


def unstated(folder: Path, base: str = "org/tiny") -> Path:
    """A client without a statement."""
    client(folder, num_examples=None, seed=len(folder.name))
    rewrite_json(folder / "adapter_config.json", {"base_model_name_or_path": base})
    return folder


def pissa(folder: Path) -> None:
    rewrite_json(unstated(folder) / "adapter_config.json", {"init_lora_weights": "pissa"})


def wide(folder: Path) -> None:
    client(folder, width=12)


def copy_with_other_bytes(folder: Path) -> None:
    poison(Path(shutil.copytree(folder.parent / "c", folder)), 0.5)


BESIDE: dict[str, Callable[[Path], object]] = {
    "a start that changes the base": pissa,
    "another base model": lambda folder: unstated(folder, base="org/other"),
    "another shape": wide,
    "a pickle": lambda folder: (folder.mkdir(), (folder / "adapter_model.bin").write_bytes(b"no")),
    "not a number": lambda folder: poison(unstated(folder), float("nan")),
    "another one that claims an input's id": copy_with_other_bytes,
}


@pytest.fixture
def merged(lora_merge: Run, tmp_path: Path) -> None:
    """`global`, of `in/a`, `in/bb` and `in/c`, the last of which states an id."""
    for name in ("a", "bb"):
        unstated(tmp_path / "in" / name)
    client(tmp_path / "in" / "c", seed=3)
    assert lora_merge("aggregate", "in/*", "-o", "global", "--weights", "uniform", "-q")[0] == 0


@pytest.mark.usefixtures("merged")
@pytest.mark.parametrize("name", ["0-first", "z-last"])
@pytest.mark.parametrize("what", BESIDE)
def test_what_lies_beside_the_inputs_is_left_aside(what: str, name: str, lora_merge: Run, tmp_path: Path) -> None:
    BESIDE[what](tmp_path / "in" / name)
    code, out, err = lora_merge("verify", "global", "in/*")
    assert code == 0
    assert "identical" in out
    assert err == "1 of the adapters given is not in the merge, and left aside.\n"
    code, out, err = lora_merge("verify", "global", "in/*", "--json")
    assert (len(json.loads(out)["surplus"]), err) == (1, "")


@pytest.mark.usefixtures("merged")
def test_of_several_of_one_name_it_is_the_one_with_the_locked_bytes(lora_merge: Run, tmp_path: Path) -> None:
    copy_with_other_bytes(tmp_path / "in" / "0")
    (tmp_path / "in" / "c").rename(tmp_path / "in" / "renamed")
    client(tmp_path / "late" / "a", num_examples=None, seed=9)
    for given in (("in/*", "late/*"), ("late/*", "in/*")):
        code, out, err = lora_merge("verify", "global", *given)
        assert (code, err) == (0, "2 of the adapters given are not in the merge, and left aside.\n")
        assert "identical" in out


@pytest.mark.usefixtures("merged")
def test_a_locked_input_that_is_refused_is_named_and_no_option_that_verify_lacks(
    lora_merge: Run, tmp_path: Path
) -> None:
    rewrite_json(tmp_path / "in" / "a" / "adapter_config.json", {"init_lora_weights": "pissa"})
    code, out, err = lora_merge("verify", "global", "in/*")
    assert (code, out) == (3, "")
    assert "a: init_lora_weights" in err
    assert "hint: These inputs of the lock were not found: a." in err
    shutil.rmtree(tmp_path / "in" / "a")
    unstated(tmp_path / "in" / "a", base="org/other")
    code, out, err = lora_merge("verify", "global", "in/*")
    assert code == 8
    assert "input a: adapter_config.json" in out
    assert "--skip-rejected" not in err
    assert "--exclude" not in err
