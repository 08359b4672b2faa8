"""Tables on a narrow terminal: within its width, complete, and broken between words for as long as that is possible."""

import pytest
from rich.console import Console, Group
from rich.table import Table

from lora_merge.cli.narrow import fitted
from lora_merge.cli.output import plain

HEADERS = ("client", "base model", "examples", "runs")
ROWS = (("org/client-1", "organisation/a-model-of-13b", "1000", "6 epochs"), ("org/b", "org/small", "20", "24 steps"))


def drawn(width: int, *headers: str, rows: tuple[tuple[str, ...], ...] = ROWS) -> list[str]:
    table = Table(*headers, show_header=bool(headers), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(plain, row))
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(fitted(Group(plain("x"), Group(table)), console))
    return [line.rstrip() for line in captured.get().splitlines()[1:]]


def test_a_table_that_fits_is_as_rich_draws_it() -> None:
    assert drawn(80, *HEADERS) == drawn(1000, *HEADERS)
    assert len(drawn(80, *HEADERS)) == 3


@pytest.mark.parametrize("width", range(12, 61))
def test_nothing_is_wider_than_the_terminal_or_lost(width: int) -> None:
    lines = drawn(width, *HEADERS)
    assert max(map(len, lines)) <= width
    letters = sorted("".join(lines).replace(" ", ""))
    for text in (*ROWS[0], *ROWS[1]):
        assert not set(text.replace(" ", "")) - set(letters)
    assert letters.count("3") == 1


@pytest.mark.parametrize("width", range(46, 61))
def test_words_are_broken_in_the_longest_column_only_and_never_in_a_header(width: int) -> None:
    words = " ".join(drawn(width, *HEADERS)).split()
    whole = [*" ".join(HEADERS).split(), "org/client-1", "1000", "6", "epochs", "24", "steps"]
    assert [word for word in whole if word not in words] == []


def test_where_words_would_be_broken_everywhere_each_cell_is_a_line() -> None:
    assert drawn(30, *HEADERS, rows=(ROWS[1], ("org/c", "", "", "3 epochs"))) == [
        "client      org/b",
        "base model  org/small",
        "examples    20",
        "runs        24 steps",
        "",
        "client      org/c",
        "runs        3 epochs",
    ]


def test_without_headers_what_is_said_is_broken_before_what_it_is_about() -> None:
    rows = (("global adapter", "/a/long/path/of/a/folder/somewhere"), ("clients", "4"))
    assert drawn(30, rows=rows) == [
        "global adapter  /a/long/path/o",
        "                f/a/folder/som",
        "                ewhere",
        "clients         4",
    ]
