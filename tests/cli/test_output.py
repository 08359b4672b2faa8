"""The one output sink: whose words go where, and what a stranger's words cannot do."""

import io
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import typer
from rich.console import Group
from rich.table import Table

from lora_merge.cli.main import main
from lora_merge.cli.output import Output, plain, printable
from lora_merge.errors import (
    LoraMergeError,
    MissingBaseError,
    NetworkError,
    NotFoundError,
    Problem,
    RefusedError,
    StorageError,
    UsageError,
)

# Clear screen, set the title, right-to-left override, zero width space, tag character, backspace, C1 control, BOM.
HOSTILE = "\x1b[2J\x1b]0;owned\x07\u202e\u200b\U000e0041\b\x9b31m\ufeff\r"

Captured = pytest.CaptureFixture[str]


def raised(output: Output, error: BaseException) -> int:
    """The exit code of a command that raises `error`."""
    with pytest.raises(typer.Exit) as caught, output.reporting():
        raise error
    return int(caught.value.exit_code)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LoraMergeError("x"), 1),
        (ZeroDivisionError("x"), 1),
        (UsageError("x"), 2),
        (MissingBaseError(["w"], why="x"), 2),
        (RefusedError([Problem("a", "b", "x")]), 3),
        (NotFoundError("x"), 4),
        (NetworkError("x"), 5),
        (StorageError("x"), 7),
        (OSError(28, "No space left on device", "out/x"), 7),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_error_has_its_documented_exit_code_in_words_and_in_json(
    error: BaseException, code: int, capsys: Captured
) -> None:
    assert raised(Output(), error) == code
    in_words = capsys.readouterr()
    assert in_words.out == ""
    assert in_words.err.startswith("error: ")
    assert "Traceback" not in in_words.err
    assert raised(Output(as_json=True), error) == code
    in_json = capsys.readouterr()
    assert in_json.err == ""
    record = json.loads(in_json.out)
    assert record["schema_version"] == 1
    assert record["error"]["code"] == code
    assert record["error"]["message"]
    assert "hint" in record["error"]


def test_an_exit_on_purpose_passes_unchanged() -> None:
    assert raised(Output(), typer.Exit(6)) == 6


def test_a_bug_asks_to_be_reported_and_shows_its_traceback_only_on_request(capsys: Captured) -> None:
    raised(Output(), ZeroDivisionError("oops"))
    err = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in err
    assert "--debug" in err
    raised(Output(debug=True), ZeroDivisionError("oops"))
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_error_of_the_file_system_names_the_file(capsys: Captured) -> None:
    raised(Output(), OSError(28, "No space left on device", "out/x"))
    assert capsys.readouterr().err == "error: No space left on device: out/x\n"


def test_an_interrupted_command_says_how_to_go_on(capsys: Captured) -> None:
    with pytest.raises(typer.Exit), Output().reporting(resume="lora-merge train x --resume"):
        raise KeyboardInterrupt
    assert "hint: lora-merge train x --resume" in capsys.readouterr().err


def test_json_lists_every_problem_where_the_words_show_the_first_forty(capsys: Captured) -> None:
    error = RefusedError([Problem(f"org/{number:03}", "lora_A", "holds NaN") for number in range(50)])
    raised(Output(), error)
    err = capsys.readouterr().err
    assert err.count("holds NaN") == 40
    assert "and 10 more (--json lists all of them)" in err
    raised(Output(as_json=True), error)
    problems = json.loads(capsys.readouterr().out)["error"]["problems"]
    assert len(problems) == 50
    assert problems[0] == {"client": "org/000", "field": "lora_A", "reason": "holds NaN"}


def test_one_reason_for_many_modules_of_a_client_is_one_line_with_an_example(capsys: Captured) -> None:
    many = [Problem("org/a", f"layer.{number:02}", "is frozen") for number in range(20)]
    few = [Problem("org/b", f"layer.{number}", "is frozen") for number in range(3)]
    error = RefusedError([*many, *few, Problem("org/a", "r", "is 0")], hint="Thaw it.")
    raised(Output(), error)
    assert capsys.readouterr().err.splitlines() == [
        "error: 24 problems in 2 inputs:",
        "  org/a: layer.00 and 19 more: is frozen",
        "  org/a: r: is 0",
        "  org/b: layer.0: is frozen",
        "  org/b: layer.1: is frozen",
        "  org/b: layer.2: is frozen",
        "hint: Thaw it.",
    ]
    raised(Output(as_json=True), error)
    assert len(json.loads(capsys.readouterr().out)["error"]["problems"]) == 24


def is_harmless(text: str) -> bool:
    return all(char == "\n" or char.isprintable() for char in text)


def through_result(output: Output, text: str) -> None:
    output.result({"x": text}, made=text, show=lambda: plain(text))


def through_a_table(output: Output, text: str) -> None:
    table = Table(show_header=False)
    table.add_row(plain(text), plain(text))
    output.result({"x": text}, made=text, show=lambda: table)


def through_a_problem(output: Output, text: str) -> None:
    raised(output, RefusedError([Problem(text, text, text)], hint=text))


WAYS: list[Callable[[Output, str], Any]] = [
    through_result,
    through_a_table,
    through_a_problem,
    lambda output, text: output.say(text),
    lambda output, text: output.warn(text),
    lambda output, text: output.usage_error(text),
    lambda output, text: raised(output, UsageError(text, hint=text)),
    lambda output, text: raised(output, ValueError(text)),
    lambda output, text: raised(Output(output.as_json, output.quiet, debug=True), ValueError(text)),
    lambda output, text: raised(output, OSError(28, text, text)),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", [{}, {"quiet": True}, {"as_json": True}])
def test_no_control_character_of_a_strangers_reaches_the_terminal(
    way: Callable[[Output, str], Any], mode: dict[str, bool], capsys: Captured
) -> None:
    way(Output(**mode), f"[/x][bold]{HOSTILE}")
    captured = capsys.readouterr()
    assert is_harmless(captured.out)
    assert is_harmless(captured.err)
    if not mode:
        assert "[/x][bold]" in captured.out + captured.err


def test_one_problem_warning_or_hint_is_one_line(capsys: Captured) -> None:
    error = RefusedError([Problem("a\nerror: forged", "b\n  org/x: forged", "c\r\nforged")], hint="d\nerror: forged")
    raised(Output(), error)
    Output().warn("e\nerror: forged")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("\\n")[0] for line in lines[1:]] == ["  a", "hint: d", "warning: e"]


def test_printable_shows_what_it_took_out() -> None:
    assert printable("a\x1b[1mé✓漢\nb\t\x00") == "a\\x1b[1mé✓漢\nb\\t\\x00"
    assert printable("\udcff") == "\\udcff"  # a byte of a file name that is no UTF-8


def test_a_pipe_gets_every_row_of_a_table_on_one_line_without_colour(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    table = Table(show_header=False, box=None)
    table.add_row(plain("clients"), plain("org/client, " * 100))
    table.add_row(plain("rank"), plain("16"))
    Output().result({}, show=lambda: table)
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("org/client") for line in lines] == [100, 0]
    assert lines[1].split() == ["rank", "16"]
    assert "\x1b" not in "".join(lines)
    assert lines == [line.rstrip() for line in lines]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_too_wide_for_the_terminal_is_folded_and_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "25")  # without it rich takes a dumb terminal for one of 80 columns
    table = Table("organisation", "examples", box=None, pad_edge=False)
    table.add_row(plain("org/a-long-name"), "1000000000")
    Output().result({}, show=lambda: Group(plain("x"), Group(table)))
    shown = terminal.getvalue()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 20
    left, right = zip(*((line[:12].strip(), line[12:].strip()) for line in shown.splitlines()[1:]), strict=True)
    assert "".join(left + right) == "organisationexamplesorg/a-long-name1000000000"


@pytest.mark.parametrize("setting", [None, "1"])
def test_no_color_is_honoured_on_a_terminal(setting: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if setting:
        monkeypatch.setenv("NO_COLOR", setting)
    Output().warn("x")
    assert ("\x1b[33m" in terminal.getvalue()) == (setting is None)
    assert "warning: " in terminal.getvalue()


@pytest.mark.parametrize(("mode", "bars"), [({}, True), ({"quiet": True}, False), ({"as_json": True}, False)])
def test_a_bar_stands_on_a_terminal_unless_asked_to_be_silent(
    mode: dict[str, bool], bars: bool, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    with Output(**mode).progress("[/x]Merging", 8, "modules") as advance:
        advance(8)
    assert ("8/8" in terminal.getvalue()) == bars
    assert ("[/x]Merging" in terminal.getvalue()) == bars
    assert capsys.readouterr().out == ""


def test_off_a_terminal_there_is_no_bar(capsys: Captured) -> None:
    with Output().progress("Merging", 8, "modules") as advance:
        advance(8)
    assert capsys.readouterr() == ("", "")


def test_talk_is_silent_where_only_the_result_was_asked_for(capsys: Captured) -> None:
    Output(quiet=True).say("x")
    Output(as_json=True).say("x")
    assert capsys.readouterr() == ("", "")
    Output().say("x")
    assert capsys.readouterr() == ("", "x\n")


def test_a_warning_is_said_in_every_mode_and_never_on_stdout(capsys: Captured) -> None:
    for mode in ({}, {"quiet": True}, {"as_json": True}):
        Output(**mode).warn("x")
        assert capsys.readouterr() == ("", "warning: x\n")


def test_a_bare_command_prints_its_help_as_it_is(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (["lora-merge"], ["lora-merge", "recipes"]):
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        ran = capsys.readouterr()
        shown = ran.out + ran.err  # typer 0.16 prints it itself, to stdout
        assert ended.value.code == 2
        assert shown.startswith("Usage: ")
        assert "\n\nOptions:\n" in shown
        assert "error:" not in shown


def test_the_list_of_commands_is_cut_nowhere_at_eighty_columns(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["lora-merge", "--help"])
    with pytest.raises(SystemExit):
        main()
    listed = capsys.readouterr().out.split("Commands:\n")[1].splitlines()
    assert len(listed) == 12
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)


def test_an_option_before_its_command_is_told_where_it_goes(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    for command, way in (
        (["-q", "aggregate", "a"], "lora-merge COMMAND … -q. "),
        (["recipes", "--debug", "list"], "lora-merge recipes COMMAND … --debug. "),
    ):
        monkeypatch.setattr(sys, "argv", ["lora-merge", *command])
        with pytest.raises(SystemExit):
            main()
        out, err = capsys.readouterr()
        assert f"An option goes after the command that it is of: {way}" in out + err
