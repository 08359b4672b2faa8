"""A recipe is strict, and its digest means its settings."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_merge import recipe_files
from lora_merge.errors import NotFoundError, UsageError
from lora_merge.recipe import Recipe

SETTINGS: dict[str, Any] = {
    "name": "ours",
    "script": "text.py",
    "base_model": "org/base",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj"],
    "seed_lora_A": 7,
    "prompt_form": "plain",
    "max_length": 64,
    "learning_rate": 0.001,
    "schedule": "linear",
    "batch_size": 8,
    "micro_batch_size": 4,
    "dtype": "fp32",
    "seed": 1,
    "steps": 3,
}

OTHER: dict[str, Any] = {
    "script": "mine.py",
    "base_model": "org/other",
    "base_commit": "0" * 40,
    "r": 5,
    "lora_alpha": 9,
    "lora_dropout": 0.1,
    "target_modules": "all-linear",
    "seed_lora_A": 8,
    "freeze_lora_A": True,
    "prompt_form": "chat",
    "max_length": 65,
    "learning_rate": 0.002,
    "schedule": "cosine",
    "batch_size": 12,
    "micro_batch_size": 2,
    "dtype": "bf16",
    "seed": 2,
    "steps": 4,
}


def write(folder: Path, **changes: Any) -> str:
    """A recipe file of `SETTINGS` with `changes`; a change to `...` leaves the setting out."""
    data = {key: value for key, value in {**SETTINGS, **changes}.items() if value is not ...}
    path = folder / "ours.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("path", recipe_files.shipped(), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_under_its_files_name_and_has_its_script(path: Path) -> None:
    loaded = recipe_files.load(path.stem)
    assert loaded.recipe.name == path.stem
    assert recipe_files.script_of(loaded).parent == recipe_files.folder()


def test_the_papers_recipes_hold_the_papers_settings() -> None:
    found = [recipe_files.load(path.stem).recipe for path in recipe_files.shipped() if path.stem.startswith("paper-")]
    assert len(found) == 4
    for paper in found:
        assert (paper.r, paper.lora_alpha, paper.lora_dropout) == (16, 32, 0.05)
        assert paper.target_modules == ("q_proj", "v_proj")
        assert (paper.learning_rate, paper.schedule, paper.batch_size, paper.max_length) == (3e-4, "linear", 64, 512)
        assert paper.prompt_form == "alpaca"
    assert {paper.base_model: paper.epochs for paper in found} == {
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 6,
        "google/gemma-2b": 6,
        "huggyllama/llama-7b": 3,
        "huggyllama/llama-13b": 3,
    }


def test_all_shipped_recipes_start_lora_A_from_one_seed() -> None:
    assert len({recipe_files.load(path.stem).recipe.seed_lora_A for path in recipe_files.shipped()}) == 1


def test_the_digest_ignores_name_comments_order_and_spelling(tmp_path: Path) -> None:
    first = recipe_files.load(write(tmp_path)).digest
    lines = Path(write(tmp_path, name="another")).read_text(encoding="utf-8").splitlines()
    respelt = ["# ours"] + [
        line.replace("0.001", "1e-3") for line in reversed(lines) if not line.startswith(("- ", "t"))
    ]
    (tmp_path / "other.yaml").write_text(
        "\n".join([*respelt, "target_modules: [v_proj, q_proj, q_proj]"]), encoding="utf-8"
    )
    assert recipe_files.load(str(tmp_path / "other.yaml")).digest == first


def test_the_digest_is_the_one_that_every_release_has_computed(tmp_path: Path) -> None:
    digest = recipe_files.load(write(tmp_path)).digest
    assert digest == "df0f21ee2c888b15ef03d76e586e8cf82e5392d381f92165a52fdfc44d114851"


@pytest.mark.parametrize("key", sorted(OTHER))
def test_the_digest_changes_with_each_setting(key: str, tmp_path: Path) -> None:
    assert recipe_files.load(write(tmp_path, **{key: OTHER[key]})).digest != recipe_files.load(write(tmp_path)).digest


def test_another_setting_is_tried_for_every_setting() -> None:
    assert set(OTHER) | {"name", "epochs"} == {entry.name for entry in dataclasses.fields(Recipe)}


def test_all_problems_of_a_recipe_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, learning_rat=1, r=0, seed=..., dtype="int4", lora_alpha=True)
    with pytest.raises(UsageError) as caught:
        recipe_files.load(path)
    message = caught.value.message
    assert "learning_rat is not a setting (did you mean learning_rate?)" in message
    assert "seed is missing" in message
    assert "r must be a whole number from 1 up, is '0'" in message
    assert "dtype must be one of bf16, fp32" in message
    assert "lora_alpha must be a whole number" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("script", "../text.py"),
        ("script", "https://example.org/text.py"),
        ("base_model", "/home/me/model"),
        ("base_model", "../model"),
        ("base_commit", "main"),
        ("base_commit", 1234),
        ("target_modules", []),
        ("target_modules", "q_proj"),
        ("target_modules", ["(a+)+$"]),
        ("learning_rate", 0),
        ("learning_rate", float("nan")),
        ("learning_rate", "fast"),
        ("lora_dropout", 1),
        ("steps", 2.5),
        ("steps", None),
        ("epochs", 1),
        ("micro_batch_size", 3),
        ("name", "a\x1b[31m"),
        ("max_length", 2**31),
    ],
)
def test_a_wrong_value_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="steps|epochs" if key in ("steps", "epochs") else key):
        recipe_files.load(write(tmp_path, **{key: value}))


def test_a_setting_that_comes_twice_is_refused(tmp_path: Path) -> None:
    path = Path(write(tmp_path))
    path.write_text(path.read_text(encoding="utf-8") + "r: 8\n", encoding="utf-8")
    with pytest.raises(UsageError, match="r comes twice"):
        recipe_files.load(str(path))


@pytest.mark.parametrize("text", ["- 1\n", "a: [", "just words\n", "", "1: 2\n", "!!python/object:os.system {}\n"])
def test_what_is_not_a_mapping_of_settings_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "ours.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"ours\.yaml"):
        recipe_files.load(str(tmp_path / "ours.yaml"))


def test_an_override_is_typed_and_recorded_beside_the_digest_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path)
    loaded = recipe_files.load(path, ["learning_rate=2e-3", "target_modules=[o_proj]", "base_commit=null", "r=4"])
    assert loaded.recipe.learning_rate == 0.002
    assert loaded.recipe.target_modules == ("o_proj",)
    assert loaded.overrides == {
        "learning_rate": 0.002, "target_modules": ["o_proj"], "base_commit": None, "r": 4,
    }  # fmt: skip
    assert loaded.digest == recipe_files.load(path).digest
    assert loaded.digest != loaded.recipe.digest()


def test_overriding_epochs_replaces_steps_and_the_other_way_round(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert recipe_files.load(path, ["epochs=2"]).recipe.steps is None
    assert recipe_files.load(path, ["epochs=2"]).recipe.epochs == 2.0
    assert recipe_files.load(path, ["epochs=2", "steps=null"]).recipe.epochs == 2.0
    with pytest.raises(UsageError, match="exactly one"):
        recipe_files.load(path, ["epochs=2", "steps=5"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("learning_rat=1", "did you mean learning_rate"),
        ("r", "KEY=VALUE"),
        ("=1", "KEY=VALUE"),
        ("r=[", "not YAML"),
        (f"r={'[' * 5000}", "not YAML"),
        ("seed=2026-13-45", "not YAML"),
        ("r=two", "whole number"),
        ("name=x", "name"),
    ],
    ids=range(8),
)
def test_a_wrong_override_is_refused(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=told):
        recipe_files.load(write(tmp_path), [text])


def test_an_override_cannot_repair_a_wrong_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="r must be"):
        recipe_files.load(write(tmp_path, r=0), ["r=4"])


def test_an_unknown_name_is_not_found_and_the_nearest_is_told() -> None:
    with pytest.raises(NotFoundError, match="did you mean laptop"):
        recipe_files.load("labtop")


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"gone\.yaml"):
        recipe_files.load(str(tmp_path / "gone.yaml"))


def test_a_script_beside_the_recipe_goes_before_the_shipped_one(tmp_path: Path) -> None:
    loaded = recipe_files.load(write(tmp_path))
    assert recipe_files.script_of(loaded) == recipe_files.folder() / "text.py"
    (tmp_path / "text.py").write_text("", encoding="utf-8")
    assert recipe_files.script_of(loaded) == tmp_path / "text.py"


def test_a_script_that_is_nowhere_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"mine\.py"):
        recipe_files.script_of(recipe_files.load(write(tmp_path, script="mine.py")))


def test_a_copy_loads_to_the_same_digest_and_never_overwrites_unasked(tmp_path: Path) -> None:
    files = recipe_files.copy("laptop", tmp_path / "new" / "folder")
    assert [path.name for path in files] == ["laptop.yaml", "text.py"]
    assert recipe_files.load(str(files[0])).digest == recipe_files.load("laptop").digest
    files[1].write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="Already there"):
        recipe_files.copy("laptop", tmp_path / "new" / "folder")
    assert files[1].read_text(encoding="utf-8") == "mine"
    recipe_files.copy("laptop", tmp_path / "new" / "folder", force=True)
    assert files[1].read_bytes() == (recipe_files.folder() / "text.py").read_bytes()
