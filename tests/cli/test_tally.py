"""The lines of a watch: no wider than the terminal, with the columns that hold anything."""

import json
import sys
from pathlib import Path

import pytest

from lora_merge.cli.output import ENDLESS, Output
from lora_merge.cli.tally import Tally, columns_of, show
from lora_merge.ledger import Ledger
from lora_merge.watching.events import Arrival, Refusal, Started
from tests.cli.running import Run, lora_merge
from tests.cli.test_output import Terminal
from tests.test_watch import client

__all__ = ["lora_merge"]  # a fixture

MEASURED = {"loss": {"value": 11.234, "low": 11.123, "high": 11.345}}
MEASURED["perplexity"] = MEASURED["loss"]
NAME = "a-large-organisation/with-a-client-of-a-long-name-017"
REASON = ", ".join(["num_examples: 100000 is above 5 times the median"] * 4)


class Scores:
    """Measurements as of a watch with --data."""

    def of(self, place: str, event: object) -> list[dict[str, dict[str, float]]]:
        return [MEASURED]


@pytest.fixture
def ledger(lora_merge: Run, tmp_path: Path) -> Ledger:
    client(tmp_path, 0)
    assert lora_merge("aggregate", "client-0", "-o", "global", "-q")[0] == 0
    from lora_merge.folding.global_adapter import ledger_in

    return ledger_in(tmp_path / "global", "global")


@pytest.mark.parametrize("width", range(50, 121, 5))
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("on_hub", [False, True])
def test_no_line_is_wider_than_the_terminal(
    width: int, measured: bool, on_hub: bool, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", "25")
    out = Output()
    tally = Tally("org/global", 0.0, None, columns_of(out.columns, measured=measured, on_hub=on_hub))
    commit, scores = "c0ffee" * 7 if on_hub else None, Scores() if measured else None
    arrival = Arrival(NAME, NAME, commit, False, ledger, commit, None, (), 0.1)
    for event in (Started("org/global", ledger, commit), arrival, Refusal(NAME, commit, REASON, "watch with --x")):
        show(out, event, tally, scores)  # type: ignore[arg-type]
    titles, _, came, *refused = terminal.getvalue().splitlines()
    assert max(map(len, (titles, came, *refused))) <= width
    assert titles.split()[:2] == ["clients", "arrived"]
    assert came.split()[1].removeprefix("..") in NAME
    assert "11.234 [11.12, 11.35]" in came or not measured
    assert " ".join(" ".join(refused).split()).endswith("watch with --x")


@pytest.mark.parametrize(
    ("width", "measured", "on_hub", "titles"),
    [
        (80, False, False, ["clients", "arrived", "", "examples"]),
        (80, True, True, ["clients", "arrived", "", "examples", "loss, nats a token", "commit"]),
        (50, True, True, ["clients", "arrived", "", "loss, nats a token"]),
        (
            ENDLESS,
            True,
            True,
            ["clients", "arrived", "", "examples", "loss, nats a token", "perplexity", "commit"],
        ),
    ],
)
def test_a_column_that_holds_nothing_is_left_out_and_a_narrow_terminal_leaves_out_more(
    width: int, measured: bool, on_hub: bool, titles: list[str]
) -> None:
    assert list(columns_of(width, measured=measured, on_hub=on_hub).widths) == titles


def test_a_pipe_gets_each_event_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally("org/global", 0.0, None, columns_of(Output().columns, measured=False, on_hub=False))
    show(Output(), Refusal(NAME, None, REASON, "A hint."), tally, None)
    [line] = capsys.readouterr().out.splitlines()
    assert line.split() == f"0 {NAME} refused {REASON}. A hint.".split()
    show(Output(as_json=True, lines=True), Refusal("a", None, "b", "A hint."), tally, None)
    assert json.loads(capsys.readouterr().out)["hint"] == "A hint."
