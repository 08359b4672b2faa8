"""Whatever is wrong with a client's folder is refused before anything is written, by client and by field."""

import json
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
import torch

from lora_merge import aggregate
from lora_merge.checkpoint.peft_folder import FolderRefused, open_folder
from lora_merge.errors import RefusedError, UsageError
from tests.adapters import CONFIG, WEIGHTS, edited, rewrite_json
from tests.checkpoint.hostile import CORPUS
from tests.checkpoint.spoil import Q0_A, Q0_B, one, with_entry

SECONDS = 5.0


@pytest.mark.parametrize("case", CORPUS)
def test_a_hostile_folder_is_refused_by_name_and_nothing_is_written(
    case: str, plain: tuple[Path, ...], tmp_path: Path
) -> None:
    bad = edited(plain[1], tmp_path / "in" / "bad")
    CORPUS[case].act(bad)
    (tmp_path / "out").mkdir()
    began = time.monotonic()
    with pytest.raises(RefusedError) as caught:
        aggregate([plain[0], bad, plain[2]], tmp_path / "out" / "global", weights="uniform")
    assert time.monotonic() - began < SECONDS
    blamed = [problem for problem in caught.value.problems if problem.client.endswith("bad")]
    assert blamed
    assert CORPUS[case].named in " ".join(f"{problem.field} {problem.reason}" for problem in blamed)
    assert list((tmp_path / "out").iterdir()) == []


SWAP = """
import os, sys
folder, text = sys.argv[1], open(os.path.join(sys.argv[1], "adapter_config.json")).read()
plain, pipe, place = (os.path.join(folder, name) for name in ("plain", "pipe", "adapter_config.json"))
while True:
    open(plain, "w").write(text)
    os.rename(plain, place)
    os.mkfifo(pipe)
    os.rename(pipe, place)
"""


def test_a_pipe_that_takes_a_files_place_at_any_moment_hangs_nothing(plain: tuple[Path, ...], tmp_path: Path) -> None:
    folder, refused = edited(plain[0], tmp_path / "a"), 0

    def read() -> None:
        nonlocal refused
        end = time.monotonic() + 1
        while time.monotonic() < end:
            try:
                open_folder(folder).close()
            except FolderRefused:
                refused += 1

    swapping = subprocess.Popen([sys.executable, "-c", SWAP, folder])
    try:
        reading = Thread(target=read, daemon=True)
        reading.start()
        reading.join(SECONDS + 1)
    finally:
        swapping.kill()
        swapping.wait()
    assert not reading.is_alive()
    assert refused


def test_every_problem_of_every_client_is_in_one_error(plain: tuple[Path, ...], tmp_path: Path) -> None:
    one_bad = edited(plain[0], tmp_path / "in" / "one", config={"r": 10**7, "init_lora_weights": "pissa"})
    two_bad = edited(plain[1], tmp_path / "in" / "two", config={"kasa_config": {"beta": 1}, "bias": "some"})
    three_bad = edited(plain[2], tmp_path / "in" / "three")
    rewrite_json(three_bad / "lora_merge.json", {"num_examples": -5})
    (three_bad / WEIGHTS).write_bytes(b"")
    with pytest.raises(RefusedError) as caught:
        aggregate([one_bad, plain[0], two_bad, three_bad], tmp_path / "global", weights="uniform")
    named = {(problem.client.removeprefix("org/"), problem.field) for problem in caught.value.problems}
    assert {("one", "r"), ("one", "init_lora_weights"), ("two", "kasa_config"), ("two", "bias")} <= named
    assert {client for client, _ in named} == {"one", "two", "three"}
    assert len([client for client, _ in named if client == "three"]) >= 2
    assert not (tmp_path / "global").exists()
    assert all(str(problem) in caught.value.message for problem in caught.value.problems)


def problems_of(folder: Path) -> set[str]:
    """The fields for which a folder is refused."""
    with pytest.raises(FolderRefused) as caught:
        open_folder(folder)
    return {reason.field for reason in caught.value.reasons}


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "9" * 5000])
def test_a_number_that_is_none_hides_nothing_else_in_the_config(
    number: str, plain: tuple[Path, ...], tmp_path: Path
) -> None:
    bad = edited(plain[0], tmp_path / "bad", config={"foo": 1, "r": -3, "alpha_pattern": {"q_proj": "@"}})
    (bad / CONFIG).write_text((bad / CONFIG).read_text().replace('"@"', number))
    assert problems_of(bad) == {CONFIG, "foo", "r", "alpha_pattern"}
    ignored = edited(plain[0], tmp_path / "ignored", config={"lora_dropout": "@", "megatron_core": ["@"]})
    (ignored / CONFIG).write_text((ignored / CONFIG).read_text().replace('"@"', number))
    assert problems_of(ignored) == {CONFIG}  # none is accepted, be it where nobody looks


def test_what_the_config_and_the_statement_are_refused_for_hides_no_tensor(
    plain: tuple[Path, ...], tmp_path: Path
) -> None:
    bad = edited(
        plain[0],
        tmp_path / "bad",
        config={"foo": 1, "init_lora_weights": "pissa"},
        tensors=lambda own: {**own, "stranger": torch.ones(2)},
    )
    rewrite_json(bad / "lora_merge.json", {"num_examples": -5})
    assert problems_of(bad) == {"foo", "init_lora_weights", "lora_merge.json, num_examples", "stranger"}


@pytest.mark.parametrize("config", [{"r": -3}, {"peft_type": "IA3"}, {"modules_to_save": 7}])
def test_tensors_are_not_held_against_what_cannot_be_read(
    config: dict[str, object], plain: tuple[Path, ...], tmp_path: Path
) -> None:
    assert problems_of(edited(plain[0], tmp_path / "bad", config=config)) == set(config)


def test_numbers_that_overflow_on_the_way_are_refused_and_not_written(plain: tuple[Path, ...], tmp_path: Path) -> None:
    bad = edited(plain[1], tmp_path / "in" / "bad")
    one(Q0_A, with_entry(3e38)).act(bad)
    one(Q0_B, with_entry(3e38)).act(bad)
    (tmp_path / "out").mkdir()
    with pytest.raises((RefusedError, UsageError), match="q_proj"):
        aggregate([plain[0], bad], tmp_path / "out" / "global")
    assert list((tmp_path / "out").iterdir()) == []


def test_numbers_that_do_not_fit_the_written_type_are_refused(plain: tuple[Path, ...], tmp_path: Path) -> None:
    large = edited(plain[1], tmp_path / "in" / "large")
    one(Q0_A, with_entry(1e6)).act(large)
    (tmp_path / "out").mkdir()
    with pytest.raises((RefusedError, UsageError), match="q_proj"):
        aggregate([plain[0], large], tmp_path / "out" / "global", dtype="fp16")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("first", ["exact", "svd", "fedavg"])
def test_nan_is_refused_by_every_method_and_names_the_tensor(
    first: str, plain: tuple[Path, ...], tmp_path: Path
) -> None:
    bad = edited(plain[1], tmp_path / "in" / "bad")
    one(Q0_B, with_entry(float("nan"))).act(bad)
    with pytest.raises(RefusedError) as caught:
        aggregate([plain[0], bad], tmp_path / "global", method=first)
    assert [(problem.client, problem.field) for problem in caught.value.problems] == [("org/bad", Q0_B)]


def test_a_regex_in_target_modules_is_never_evaluated(plain: tuple[Path, ...], tmp_path: Path) -> None:
    slow = edited(plain[1], tmp_path / "in" / "slow", config={"target_modules": "(([a-z]+)+)+$(?#never matches)!"})
    began = time.monotonic()
    aggregate([plain[0], slow], tmp_path / "global")
    assert time.monotonic() - began < SECONDS
    assert "(" not in str(json.loads((tmp_path / "global" / CONFIG).read_text())["target_modules"])


HARMLESS = {
    "megatron_core": "megatron.core",
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "evil.module"},
    "qalora_group_size": 16,
    "runtime_config": {"ephemeral_gpu_offload": False},
    # PEFT names both "classifier" and "score" for every sequence classifier, which has only one of them.
    "modules_to_save": ["classifier", "score"],
    "invented_next_year": None,
    "invented_later": [],
    "invented_last": False,
    "revision": "main",
    # PEFT ignores the settings of a start that the config does not name, and leaves them where it made one plain.
    "loftq_config": {"loftq_bits": 4},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"direction": "ArB2r"},
    "init_lora_weights": "Gaussian",
}


def test_what_peft_itself_writes_and_unknown_fields_that_are_empty_pass(
    plain: tuple[Path, ...], tmp_path: Path
) -> None:
    fine = edited(plain[1], tmp_path / "in" / "fine", config=HARMLESS)
    aggregate([plain[0], fine], tmp_path / "global")
    written = (tmp_path / "global" / CONFIG).read_text()
    assert "evil" not in written
    assert "megatron" not in written


def test_a_pickle_beside_sound_weights_is_not_read(plain: tuple[Path, ...], tmp_path: Path) -> None:
    both = edited(plain[1], tmp_path / "in" / "both")
    (both / "adapter_model.bin").write_bytes(b"not even a pickle")
    aggregate([plain[0], both], tmp_path / "global")
    assert not (tmp_path / "global" / "adapter_model.bin").exists()


def test_links_to_sound_files_are_read_as_in_the_hubs_cache(plain: tuple[Path, ...], tmp_path: Path) -> None:
    linked = tmp_path / "in" / "linked"
    linked.mkdir(parents=True)
    for path in plain[1].iterdir():
        (linked / path.name).symlink_to(path)
    aggregate([plain[0], linked], tmp_path / "global")
    assert (tmp_path / "global" / WEIGHTS).exists()
