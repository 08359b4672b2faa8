"""The card survives huggingface_hub's own reading, says what is in the records, and holds nobody's markup."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from lora_merge.card.card import global_card
from lora_merge.card.merged import Place
from lora_merge.ledger import Contribution, Ledger, LeftOut
from lora_merge.publish.prepare import prepare
from tests.hub.client import Client
from tests.hub.server import LocalHub
from tests.publish.test_prepare import card

COMMITS = ("1" * 40, "2" * 40)


def numbers(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def row(name: str, kind: str, loss: float) -> dict[str, Any]:
    return {"name": name, "kind": kind, "loss": numbers(loss), "perplexity": numbers(loss * 10)}


EVALUATION = {
    "schema_version": 1,
    "data": "/srv/data/held-out.jsonl",
    "rows": 12,
    "models": [row("base", "base", 3.0), row("org/client-a", "local", 2.5), row("global", "global", 2.25)],
}


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(EVALUATION))
    return path


@pytest.fixture
def ledger(merged: Path) -> Ledger:
    """The ledger of two clients that came from the Hub."""
    found = Ledger.from_json(json.loads((merged / "aggregation.json").read_text()))
    pinned = zip(found.contributions, COMMITS, strict=True)
    clients = [dataclasses.replace(each, source=each.client_id, commit=commit) for each, commit in pinned]
    return dataclasses.replace(found, contributions=clients)


def written(ledger: Ledger, **place: Any) -> str:
    return global_card(ledger, task_type="CAUSAL_LM", base_is_local=False, place=Place("org/global", **place))


@pytest.mark.parametrize("which", ["client_a", "merged"])
def test_a_round_trip_through_model_card_keeps_all(
    which: str, request: pytest.FixtureRequest, evaluation: Path
) -> None:
    text = card(prepare(request.getfixturevalue(which), "org/x", evaluation=evaluation))
    read = ModelCard(text)
    assert read.content == text
    data = read.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "adapter")
    assert (data["library_name"], data["pipeline_tag"]) == ("peft", "text-generation")
    assert {"lora", "lora-merge", "federated-learning"} <= set(data["tags"])


def test_the_results_are_those_of_the_models_own_row(client_a: Path, merged: Path, evaluation: Path) -> None:
    for folder, loss in ((client_a, 2.5), (merged, 2.25)):
        read = ModelCard(card(prepare(folder, "org/x", evaluation=evaluation)))
        results = {result.metric_type: result.metric_value for result in read.data.eval_results}
        assert results == {"loss": loss, "perplexity": loss * 10}
        assert read.data.model_name == "x"
        assert "| base | 3.000 (2.900 to 3.100) | 30.00 |" in read.text


def test_of_the_data_only_the_files_name_is_published(client_a: Path, evaluation: Path) -> None:
    text = card(prepare(client_a, "org/x", evaluation=evaluation))
    assert "held-out.jsonl" in text
    assert "/srv" not in text


def test_the_table_has_each_contribution_at_its_commit_with_its_share(ledger: Ledger) -> None:
    text = written(ledger)
    for name, commit in zip(("org/client-a", "org/client-b"), COMMITS, strict=True):
        [line] = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        assert line.split(" | ")[1:4] == [f"{name}@{commit[:12]}", "10", "0.5000"]


def test_the_command_names_the_repository_where_there_is_a_lock(ledger: Ledger) -> None:
    assert "\nlora-merge verify org/global\n" in written(ledger, has_lock=True)


def test_the_command_names_each_commit_where_there_is_none(ledger: Ledger) -> None:
    command = f"lora-merge aggregate org/client-a@{COMMITS[0]} org/client-b@{COMMITS[1]} --method exact"
    assert command in written(ledger)


def test_who_was_left_out_or_let_in_is_said(ledger: Ledger) -> None:
    assert "Left out" not in written(ledger)
    left_out = [LeftOut(f"org/x{number}", "layer: holds NaN | <b>") for number in range(50)]
    shown = written(dataclasses.replace(ledger, left_out=left_out, waved_through=["org/y: update: has the norm 9"]))
    assert "* Left out: org/x0, since: layer: holds NaN � �b�" in shown.splitlines()
    assert "* And 11 more, in aggregation.json." in shown.splitlines()


def test_capped_counts_are_in_the_command(ledger: Ledger) -> None:
    shown = written(dataclasses.replace(ledger, weighting="examples, at most 250 each"))
    assert "weights by examples, at most 250 each," in shown
    assert "--weights examples --cap-examples 250 " in shown


def test_private_inputs_are_said(ledger: Ledger) -> None:
    assert "private" not in written(ledger)
    assert "In private repositories: 1 of the 2 adapters" in written(ledger, private_inputs=1)


def test_the_certificate_is_said(ledger: Ledger) -> None:
    assert f"updates: {ledger.certificate.sentence()}." in written(ledger)


def test_folders_as_inputs_are_said(merged: Path) -> None:
    assert "2 of the 2 adapters from folders" in card(prepare(merged, "org/x"))


@pytest.mark.parametrize("text", ["[x](http://y)", "<script>", "a | b", "`x`", "\x1b[31m", "a\n# b", "![](x)"])
def test_no_text_of_a_stranger_becomes_markup(ledger: Ledger, text: str) -> None:
    hostile: Contribution = dataclasses.replace(ledger.contributions[0], client_id=text, source=text)
    shown = written(dataclasses.replace(ledger, contributions=[hostile], method=text, weighting=text, dtype=text))
    assert text not in shown
    assert "# b" not in shown.splitlines()
    assert all(char == "\n" or char.isprintable() for char in shown)


@pytest.mark.parametrize("which", ["client_a", "merged"])
def test_the_hub_accepts_it(
    which: str, hub: LocalHub, publisher: Client, request: pytest.FixtureRequest, evaluation: Path
) -> None:
    text = card(prepare(request.getfixturevalue(which), "org/x", evaluation=evaluation))
    publisher.run("hf.ModelCard(text).validate()", text=text)
    assert len(hub.calls("POST /api/validate-yaml")) == 1


def test_a_card_of_very_many_clients_names_a_hundred(ledger: Ledger) -> None:
    one = dataclasses.replace(ledger.contributions[0], commit=None)
    many = [dataclasses.replace(one, client_id=f"org/client-{number:04}") for number in range(1000)]
    text = written(dataclasses.replace(ledger, contributions=many), has_lock=True)
    assert text.count("| org/client-") == 100
    assert "And 900 more, in aggregation.json." in text
    assert "1000 of the 1000 adapters from folders: their hashes are in aggregation.json." in text
