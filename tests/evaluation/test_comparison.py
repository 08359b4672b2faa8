"""Base, locals and globals are measured on the same rows; gains are paired; what is compared is said."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_merge import aggregate
from lora_merge.checkpoint.peft_folder import open_folder
from lora_merge.errors import NotFoundError, RefusedError, UsageError
from lora_merge.evaluation.comparison import Comparison, Question, compare, scores_of
from lora_merge.evaluation.held_out import stated_prompt_form
from lora_merge.evaluation.intervals import bootstrap
from lora_merge.statement import BaseModel, RecipeRef, Statement

Ask = Callable[..., Comparison]


@contextmanager
def no_bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda steps: None


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def ask(base: Path, adapters: tuple[Path, ...], held_out: Path, said: list[str]) -> Ask:
    """`ask(limit=1)`: the comparison of the base and the three adapters on the held-out rows."""

    def call(**changes: object) -> Comparison:
        question = Question(str(base), adapters, str(held_out), device="cpu")
        question = dataclasses.replace(question, **changes)  # type: ignore[arg-type]
        return compare(question, progress=no_bar, tell=lambda text: None, warn=said.append)

    return call


def losses(comparison: Comparison) -> dict[str, float]:
    return {score.name: score.loss.value for score in comparison.scores}


def test_every_model_has_a_score_with_the_base_first_and_the_mean_of_the_locals_after_them(ask: Ask) -> None:
    comparison = ask()
    assert [(score.name, score.kind) for score in comparison.scores] == [
        ("base", "base"),
        ("org/north", "local"),
        ("org/south", "local"),
        ("mean of locals", "mean of locals"),
        ("global", "global"),
    ]
    assert (comparison.rows, comparison.rows_left_out, comparison.prompt_form) == (4, 0, "plain")
    assert comparison.answer_tokens == 2 * (len(" three") + 1 + len("cdef") + 1)


def test_gains_are_differences_of_the_losses(ask: Ask) -> None:
    comparison = ask()
    found, scores = losses(comparison), {score.name: score for score in comparison.scores}
    assert scores["base"].gain_over_base is None
    for name in ("org/north", "mean of locals", "global"):
        gain = scores[name].gain_over_base
        assert gain is not None
        assert abs(gain.value - (found["base"] - found[name])) < 1e-12
        assert gain.interval.low <= gain.value <= gain.interval.high
    over = scores["global"].gain_over_locals
    assert over is not None
    assert abs(over.value - (found["mean of locals"] - found["global"])) < 1e-12
    assert abs(found["mean of locals"] - (found["org/north"] + found["org/south"]) / 2) < 1e-12


def test_the_order_of_the_adapters_changes_no_number(ask: Ask, adapters: tuple[Path, ...]) -> None:
    assert losses(ask()) == losses(ask(adapters=adapters[::-1]))


def test_an_adapter_of_zeros_gains_exactly_nothing(ask: Ask, adapters: tuple[Path, ...], tmp_path: Path) -> None:
    folder = tmp_path / "zeros"
    shutil.copytree(adapters[0], folder)
    path = folder / "adapter_model.safetensors"
    save_file({n: torch.zeros_like(t) for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    gain = ask(adapters=(folder,)).scores[1].gain_over_base
    assert gain is not None
    assert (gain.value, gain.interval.low, gain.interval.high) == (0, 0, 0)


def test_a_limit_draws_rows_by_the_seed(ask: Ask) -> None:
    assert [ask(limit=1, seed=seed).answer_tokens for seed in range(4)] == [
        ask(limit=1, seed=seed).answer_tokens for seed in range(4)
    ]
    assert len({ask(limit=1, seed=seed).answer_tokens for seed in range(8)}) == 2


def test_rows_without_room_for_an_answer_are_counted_and_left_out(ask: Ask) -> None:
    comparison = ask(max_length=10)  # "one and two is" is 14 tokens, "ab" is 2
    assert (comparison.rows, comparison.rows_left_out, comparison.rows_cut) == (2, 2, 0)
    assert ask(max_length=15).rows_cut == 2
    with pytest.raises(UsageError, match="keeps a token of its answer"):
        ask(max_length=2)


def test_a_prompt_that_the_model_cannot_answer_is_said_before_the_work(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(prompts=("b" * 60,), max_new_tokens=4).answers  # the model reads 64
    monkeypatch.setattr("lora_merge.evaluation.comparison.answer_nll", None)  # nothing is measured
    with pytest.raises(UsageError, match="has 60 tokens, and with 5 of an answer that is more than the 64") as refused:
        ask(prompts=("b" * 60,), max_new_tokens=5)
    assert refused.value.hint == "--max-new-tokens 4"
    with pytest.raises(UsageError, match="has 70 tokens") as refused:
        ask(prompts=("b" * 70,), max_new_tokens=5)
    assert refused.value.hint == "Ask a shorter one."
    with pytest.raises(UsageError, match="holds nothing to answer"):
        ask(prompts=("",))


def test_no_row_is_longer_than_the_model_reads(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text('{"prompt": "a", "completion": "%s"}' % ("b" * 200))
    assert ask(data=str(tmp_path / "long.jsonl")).answer_tokens == 64 - 1


def test_each_prompt_is_answered_by_each_model(ask: Ask) -> None:
    comparison = ask(prompts=("one", "two"), max_new_tokens=3)
    assert comparison.models == ("base", "org/north", "org/south", "global")
    assert [len(answers) for answers in comparison.answers] == [4, 4]


def test_two_adapters_of_one_name_go_by_their_paths(ask: Ask, adapters: tuple[Path, ...], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(adapters[0], copy)
    assert ask(adapters=(adapters[0], copy)).models == ("base", str(adapters[0]), str(copy))


def test_an_adapter_that_states_other_base_weights_is_warned_of(
    ask: Ask, adapters: tuple[Path, ...], tmp_path: Path, said: list[str]
) -> None:
    ask()
    assert said == []
    folder = tmp_path / "strange"
    shutil.copytree(adapters[0], folder)
    statement = Statement("org/strange", BaseModel(weights_sha256="0" * 64))
    (folder / "lora_merge.json").write_text(statement.to_json())
    ask(adapters=(folder,))
    assert len(said) == 1
    assert "strange" in said[0]
    assert "other base weights" in said[0]


def test_nothing_is_measured_when_an_adapter_is_missing_or_refused(
    ask: Ask, adapters: tuple[Path, ...], tmp_path: Path
) -> None:
    with pytest.raises(NotFoundError, match="none"):
        ask(adapters=(tmp_path / "none",))
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    with pytest.raises(RefusedError) as caught:
        ask(adapters=(tmp_path / "bare", *adapters, tmp_path / "empty"))
    assert {problem.client for problem in caught.value.problems} == {"bare", "empty"}


def test_the_prompt_form_is_the_one_that_the_clients_state(adapters: tuple[Path, ...], tmp_path: Path) -> None:
    def client(name: str, form: str | None) -> Path:
        shutil.copytree(adapters[0], tmp_path / name)
        statement = Statement(f"org/{name}", num_examples=1, recipe=RecipeRef("ours", "0" * 64, form))
        (tmp_path / name / "lora_merge.json").write_text(statement.to_json())
        return tmp_path / name

    def form(*folders: Path) -> str:
        return stated_prompt_form([open_folder(folder) for folder in folders])

    chat, alpaca, silent = client("chat", "chat"), client("alpaca", "alpaca"), client("silent", None)
    assert form(chat, silent) == "chat"
    assert form(silent, *adapters) == "plain"
    with pytest.raises(UsageError, match="different prompt forms: alpaca, chat"):
        form(chat, alpaca)
    aggregate([chat, silent], tmp_path / "global")
    assert form(tmp_path / "global") == "chat"
    (tmp_path / "global" / "aggregation.json").write_text("{}")
    with pytest.raises(RefusedError, match=r"aggregation\.json"):
        form(tmp_path / "global")


def test_a_global_without_locals_is_compared_to_the_base_alone() -> None:
    scores = scores_of(("base", "g"), ("base", "global"), bootstrap(torch.ones(2, 3).double(), torch.ones(3), 0))
    assert [score.name for score in scores] == ["base", "g"]
    assert scores[1].gain_over_locals is None
