"""Whatever a stranger calls things, no command's words drive a terminal, forge a line, or become markup.

Every command of the application is run, so a new one is held to this as soon as it is there.
"""

import dataclasses
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from lora_merge import aggregate
from lora_merge.card.card import Result, Results, client_card, global_card
from lora_merge.card.merged import Place
from lora_merge.cli import main as application
from lora_merge.cli.evaluate import drawn
from lora_merge.cli.output import Output
from lora_merge.ledger import Ledger
from lora_merge.statement import BaseModel, RecipeRef, Statement
from tests.adapters import CONFIG, PLAIN, STATEMENT, edited, rewrite_json

# Clears the screen, sets its title, turns the writing round, begins a C1 sequence; markup of rich, HTML and Markdown;
# forges a line; has half a character and a byte that is no UTF-8.
HOSTILE = "\x1b[2J\x1b]0;x\x07\u202e\u200b\x9b31m[/x][bold]<b>|`![](y)\nerror: forged\r\nforged\u2028\udcff"
NAME = HOSTILE.replace("/", "")  # of a folder
TEXT = re.sub(r"[\x00-\x1f\udcff]", "", HOSTILE)  # what our records accept as a text
FINE, DOCUMENTED = 0, {0, 2, 3, 4, 5, 6, 7, 8}
MODES = {"words": [], "json": ["--json"], "quiet": ["--quiet"], "debug": ["--debug"]}
# The demo lacks its base, and so stops at it; a watch waits for arrivals.
SLOW = {"demo": ["--base", NAME], "watch": [HOSTILE, "--onto", NAME, "--for", "1s"]}

Captured = pytest.CaptureFixture[str]


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command of the application, with the words that call it."""
    for name, each in sorted(getattr(command, "commands", {}).items()):
        yield from commands(each, (*words, name))
    if not hasattr(command, "commands"):
        yield words, command


COMMANDS = dict(commands(typer.main.get_command(application.app)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, federations: Any) -> Mapping[str, Any]:
    """Adapters in folders of hostile names, which name hostile bases and state hostile things; and a merge of them."""
    root = tmp_path_factory.mktemp("hostile")
    clients = []
    for number, source in enumerate(federations(PLAIN).clients[:2]):
        folder = edited(source, root / f"{number}{NAME}", config={"base_model_name_or_path": TEXT})
        (folder / STATEMENT).unlink()
        clients.append(folder)
    stating = edited(federations(PLAIN).clients[2], root / "stating", config={"base_model_name_or_path": TEXT})
    recipe = {"name": TEXT, "digest": "a" * 64, "overrides": {HOSTILE: HOSTILE}}
    rewrite_json(stating / STATEMENT, {"recipe": recipe, "base_model": {"repo": TEXT}, "versions": {TEXT: TEXT}})
    bad = edited(federations(PLAIN).clients[0], root / f"bad{NAME}", config={HOSTILE: HOSTILE, "peft_type": HOSTILE})
    (bad / STATEMENT).write_text(json.dumps({HOSTILE: HOSTILE}))
    aggregate([*clients, stating], root / "merged", weights="uniform")
    return {"root": root, "sound": [*clients, stating], "bad": [*clients, bad], "merged": root / "merged"}


def arguments(command: Any, place: Mapping[str, Any], which: str, output: Path) -> list[str]:
    """What a command must be given: folders where it takes such, and hostile text for all else."""
    adapters = [str(path) for path in place[which]]
    given = {"sources": adapters, "adapters": adapters, "adapter": adapters[-1:], "folder": adapters[-1:]}
    given |= {"target": [str(place["merged"])], "output": [str(output / NAME)], "destination": [str(output / NAME)]}
    words: list[str] = []
    for parameter in command.params:
        argument = parameter.param_type_name == "argument"
        if not (argument or parameter.required or parameter.name == "output"):
            continue
        values = given.get(parameter.name, [HOSTILE])
        words += values if argument else [parameter.opts[0], values[0]]
    return words


def run(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the application as the console script does; the exit code."""
    monkeypatch.setattr(sys, "argv", ["lora-merge", *words])
    with pytest.raises(SystemExit) as ended:
        application.main()
    return int(ended.value.code or 0)


def require_harmless(text: str) -> None:
    """Nothing but printable characters, in lines that are ours."""
    assert [char for char in text if char != "\n" and not char.isprintable()] == []
    assert [line for line in text.split("\n") if line.startswith(("error: forged", "forged"))] == []


def require_documented(code: int, captured: Any, mode: str) -> None:
    """A documented end, in harmless words."""
    require_harmless(captured.out)
    require_harmless(captured.err)
    assert code in DOCUMENTED, captured.err
    assert mode == "debug" or "Traceback" not in captured.err
    if mode == "json" and captured.out:
        require_json(captured.out)


def require_json(text: str) -> None:
    """One object, or one a line; of our schema."""
    try:
        objects = [json.loads(text)]
    except json.JSONDecodeError:
        objects = [json.loads(line) for line in text.splitlines()]
    assert [each["schema_version"] for each in objects] == [1] * len(objects)


def flags(command: Any, mode: str) -> list[str] | None:
    """The options of a mode; None where the command has no such mode."""
    known = {option for parameter in command.params for option in parameter.opts}
    return MODES[mode] if known.issuperset(MODES[mode]) else None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("which", ["sound", "bad"])
def test_no_command_says_anything_hostile_of_hostile_inputs(
    words: tuple[str, ...],
    mode: str,
    which: str,
    place: Mapping[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    command = COMMANDS[words]
    if (options := flags(command, mode)) is None:
        pytest.skip("has no such mode")
    monkeypatch.chdir(tmp_path)
    given = SLOW.get(words[0], arguments(command, place, which, tmp_path))
    code = run([*words, *given, *options], monkeypatch)
    require_documented(code, capsys.readouterr(), mode)


def text_options() -> list[tuple[tuple[str, ...], str]]:
    """Every option that takes a value; that it should be a number is said by the parser, which shows the value."""
    return [
        (words, parameter.opts[0])
        for words, command in COMMANDS.items()
        for parameter in command.params
        if parameter.param_type_name == "option" and not parameter.is_flag
    ]


@pytest.mark.parametrize(("words", "option"), text_options(), ids=lambda part: "".join(part))
def test_no_option_of_any_command_gives_a_hostile_text_back(
    words: tuple[str, ...],
    option: str,
    place: Mapping[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = SLOW.get(words[0], arguments(COMMANDS[words], place, "sound", tmp_path))
    code = run([*words, *given, option, NAME], monkeypatch)
    require_documented(code, capsys.readouterr(), "words")


def test_hostile_names_are_merged_and_shown_by_their_escapes(
    place: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    sources = [str(path) for path in place["sound"]]
    assert run(["aggregate", *sources, "-o", str(tmp_path / "out"), "--weights", "uniform"], monkeypatch) == FINE
    captured = capsys.readouterr()
    require_harmless(captured.out)
    assert "\\x1b[2J" in captured.out
    assert "[/x]".replace("/", "") in captured.out


def test_an_evaluations_tables_hold_no_markup(capsys: Captured) -> None:
    numbers = {"value": 1.0, "low": 0.5, "high": 1.5}
    model = {"name": HOSTILE, "kind": "global", "loss": numbers, "perplexity": numbers, "gain_over_base": numbers}
    answers = {"prompt": HOSTILE, "answers": {HOSTILE: HOSTILE * 3}}
    record = {"rows": 1, "rows_left_out": 0, "rows_cut": 0, "answer_tokens": 1, "answers": [answers]}
    record["models"] = [model | {"gain_over_mean_of_locals": numbers}]
    Output().result(record, show=lambda: drawn(record))
    assert [char for char in capsys.readouterr().out if char != "\n" and not char.isprintable()] == []


# What a stranger decides in a card: all of it goes through here once in earnest and once in plain letters.
def cards(text: str, ledger: Ledger) -> Iterator[str]:
    name = text[:80] or "x"
    contributions = [dataclasses.replace(each, client_id=text, source=text) for each in ledger.contributions]
    pinned = [dataclasses.replace(each, commit="a" * 40) for each in contributions]
    results = Results(text, 1, [row := Result(name, "global", 1.0, 0.5, 1.5, 2.0)], row)
    for clients in (contributions, pinned):
        options = {"rank": text, "energy": 0.5}
        changed = dataclasses.replace(ledger, contributions=clients, method=text, weighting=text, options=options)
        changed = dataclasses.replace(changed, dtype=text, base_model=text)
        for place in (Place("org/global"), Place("org/global", has_lock=True, private_inputs=1)):
            yield global_card(changed, task_type="CAUSAL_LM", base_is_local=False, place=place, results=results)
    recipe = RecipeRef(text, "a" * 64, text, {text: text})
    statement = Statement(text, BaseModel(text, "a" * 40, "b" * 64), 1, recipe, versions={text: text})
    yield client_card(statement, base_model=text, task_type="CAUSAL_LM", repo="org/x", results=results)


@pytest.mark.parametrize(
    "text",
    [
        HOSTILE,
        TEXT,
        "---\nbase_model: org/evil\n---",
        "x\n# Trust me",
        "a: b",
        "- a",
        "&a *a",
        "{{x}}",
        "%s",
        "$(id)",
    ],
)
def test_a_card_keeps_its_form_whatever_a_stranger_writes(text: str, place: Mapping[str, Any]) -> None:
    ledger = Ledger.from_json(json.loads((place["merged"] / "aggregation.json").read_text()))
    for written, harmless in zip(cards(text, ledger), cards("plain words", ledger), strict=True):
        require_harmless(written)
        front, plain = (yaml.safe_load(card.split("---\n")[1]) for card in (written, harmless))
        assert front.keys() == plain.keys()
        assert "base_model" not in front
        body, expected = (card.split("---\n", 2)[2] for card in (written, harmless))
        assert len(body.splitlines()) == len(expected.splitlines())
        assert not re.search(r"[<>]|!\[|\]\(|\$\(", body)
        assert body.count("|") == expected.count("|")
        assert body.count("`") == expected.count("`")


def environment(**changes: str) -> dict[str, str]:
    """The environment of a process, without what tests set for themselves."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", **changes}


# In one process, for each is quick and Python's start is not: what is printed is all that matters here.
EVERY_HELP = """
import json, sys
from lora_merge.cli.main import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["lora-merge", *words, "--help"]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, words
"""


def test_every_help_is_readable_in_twenty_columns_of_ascii() -> None:
    told = environment(LC_ALL="C", COLUMNS="20", TERM="dumb")
    command = [sys.executable, "-c", EVERY_HELP, json.dumps([[], *COMMANDS])]
    ran = subprocess.run(command, env=told, capture_output=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr.decode()
    assert b"Traceback" not in ran.stderr
    assert ran.stdout.isascii()


CLI = [sys.executable, "-m", "lora_merge"]


def test_a_locale_that_is_not_utf8_gets_escapes_and_writes_the_same_bytes(
    place: Mapping[str, Any], tmp_path: Path
) -> None:
    # A folder's name that is not ASCII is another one there: only what the files hold can be the same.
    adapters = [str(place["sound"][2])]
    command = [*CLI, "aggregate", *adapters, "-o", str(tmp_path / "out"), "--weights", "uniform"]
    ran = subprocess.run(command, env=environment(LC_ALL="C"), capture_output=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr.decode()
    assert ran.stdout.isascii()
    assert ran.stderr.isascii()
    aggregate(adapters, tmp_path / "here", weights="uniform")
    for name in (CONFIG, "aggregation.json", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


@pytest.mark.parametrize("options", [[], ["--json"], ["-q"]], ids=["words", "json", "quiet"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_standard_output_is_exit_7_in_a_sentence(options: list[str], unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        told = environment(PYTHONUNBUFFERED=unbuffered)
        command = [*CLI, "recipes", "list", *options]
        ran = subprocess.run(command, env=told, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert ran.returncode == 7
    assert ran.stderr == "error: The result could not be written to standard output: No space left on device.\n"


@pytest.mark.parametrize(
    "words",
    [["recipes", "list"], ["--help"], ["--version"], ["recipes", "list", "--json"], ["aggregate", "--help"]],
    ids=" ".join,
)
def test_a_pipe_that_nobody_reads_is_exit_7_without_a_traceback(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(
        [*CLI, *words], env=environment(), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    os.close(writer)
    assert ran.returncode == 7
    assert "Traceback" not in ran.stderr
    assert "Exception ignored" not in ran.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_the_first_lines_of_a_help_end_without_a_traceback_or_an_exit_of_1(unbuffered: str) -> None:
    command = f"{sys.executable} -m lora_merge aggregate --help | head -2; exit ${{PIPESTATUS[0]}}"
    told = environment(PYTHONUNBUFFERED=unbuffered)
    ran = subprocess.run(["bash", "-c", command], env=told, capture_output=True, text=True, timeout=60, check=False)
    assert ran.stdout.startswith("Usage: lora-merge aggregate")
    assert ran.returncode in (0, 7)  # as the help is written before or after head has gone
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_stream_that_is_closed_or_full_takes_no_other_with_it(closed: str) -> None:
    for to in (f"{closed}>&-", f"{closed}>/dev/full"):
        command = f"{sys.executable} -m lora_merge recipes show nothing-of-that-name {to}"
        ran = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True, timeout=60)
        assert ran.returncode == 4, to
        assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("colours", [{}, {"NO_COLOR": "1"}])
def test_a_terminal_of_twenty_columns_gets_whole_escape_sequences_of_ours_only(colours: dict[str, str]) -> None:
    told = environment(PYTHONUTF8="1", TERM="xterm-256color", COLUMNS="20", **colours)
    shown = on_a_terminal([*CLI, "recipes", "list"], told) + on_a_terminal(
        [*CLI, "aggregate", HOSTILE, "-o", "x"], told
    )
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown).replace("\r\n", "\n")
    assert [char for char in plain if char != "\n" and not char.isprintable()] == []
    assert "[/x][bold]" in plain.replace("\n", "")
    assert not colours or not re.search(r"\x1b\[[0-9;]*3[0-9]", shown)


def on_a_terminal(command: list[str], env: Mapping[str, str]) -> str:
    """What a command writes to a terminal, stdout and stderr together."""
    ours, theirs = pty.openpty()
    with subprocess.Popen([os.fsencode(word) for word in command], env=env, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 1 << 16)
            except OSError:  # how Linux says that the other side is closed
                break
            if not piece:
                break
            shown += piece
        process.wait(60)
    os.close(ours)
    return shown.decode("utf-8")
