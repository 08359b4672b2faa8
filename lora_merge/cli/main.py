"""`lora-merge`: the application, and the table of its commands."""

import atexit
import gc
import sys
from typing import Annotated, Any

import typer

from lora_merge import __version__
from lora_merge.cli.aggregate import aggregate
from lora_merge.cli.check import check
from lora_merge.cli.demo import demo
from lora_merge.cli.evaluate import evaluate
from lora_merge.cli.export import export
from lora_merge.cli.init import init
from lora_merge.cli.inspect import inspect
from lora_merge.cli.output import Output
from lora_merge.cli.push import push
from lora_merge.cli.recipes import recipes_app
from lora_merge.cli.settings_file import load_defaults, require_hub_address, set_elsewhere
from lora_merge.cli.streams import discard, open_streams
from lora_merge.cli.train import train
from lora_merge.cli.verify import verify
from lora_merge.cli.watch import watch

_TRUE = ("1", "true", "t", "yes", "y", "on")  # as the parser reads a flag

app = typer.Typer(
    name="lora-merge",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def lora_merge(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Merge LoRA adapters that were fine-tuned apart: one exact mean, no server, no rounds."""
    with _output().reporting():
        load_defaults(context)
        require_hub_address()


# What each is listed as by `lora-merge --help`: a line of 80 columns, where typer would cut the first sentence.
app.command(short_help="Fine-tune one client's adapter by a recipe that all share.")(train)
app.command(short_help="Say what push and aggregate would say of one adapter.")(check)
app.command(short_help="Look at adapters before merging: norms, cosines, copies.")(inspect)
app.command(short_help="Merge adapters into one global adapter; or add late ones.")(aggregate)
app.command(short_help="Bring in each client's update as it appears.")(watch)
app.command(short_help="The whole loop on this machine, with a small model.")(demo)
app.command(short_help="Make a published merge again from its inputs, and compare.")(verify)
app.command(short_help="Base, locals and global side by side, on held-out rows.")(evaluate)
app.command(short_help="Write the base model with the adapter merged in.")(export)
app.command(short_help="Publish what all clients of a federation share.")(init)
app.command(short_help="Publish an adapter folder on the Hub, in one commit.")(push)
app.add_typer(recipes_app, name="recipes")


def main() -> None:
    """The command line. A wrong one is exit 2, as JSON where ``--json`` was asked for."""
    open_streams()
    _let_imports_be()
    try:
        code = _run()
        sys.stdout.flush()
    except OSError as error:  # of --help or --version, to a full disk or a closed pipe; commands see to it themselves
        discard(sys.stdout)
        code = 7
        Output().warn(f"standard output cannot be written: {error.strerror}.")
    except SystemExit as error:  # of a closed pipe, the parser and rich make an exit of 1, which here is a bug of ours
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        discard(sys.stdout)
        code = 7
    sys.exit(code)


def _let_imports_be() -> None:
    """What torch and transformers make at import lives to the end. Looking for garbage among it at every 700 new ones,
    and once more at the exit, took a quarter of a command's start.
    """
    gc.set_threshold(50_000, 20, 100)
    atexit.register(gc.freeze)


def _run() -> int:
    try:
        return int(app(prog_name="lora-merge", standalone_mode=False) or 0)
    except Exception as error:
        # The parser's own errors carry `format_message`; a command reports its errors itself.
        if not hasattr(error, "format_message"):
            raise
        message, out = _sentence(error), _output(getattr(error, "ctx", None))
        if message.startswith("Usage: ") and not out.as_json:  # of a bare `lora-merge`, the error is the help
            print(message, file=sys.stderr)
        elif message:  # or, of an older typer, empty: it was printed already
            out.usage_error(message, set_elsewhere(message) or _way_on(error))
        return 2


def _output(context: Any = None) -> Output:
    """Where to speak before a command does, or where none could be made of the command line for `context`."""
    defaults = getattr(context, "default_map", None) or {}  # of the command: what `load_defaults` has found
    is_set = str(defaults.get("as_json", "")).strip().lower() in _TRUE
    return Output(as_json=is_set or "--json" in sys.argv, lines=sys.argv[1:2] == ["watch"])


def _sentence(error: Any) -> str:
    """What is wrong with the command line. Of a wrong value a newer typer has but the words of pydantic."""
    message = str(error.format_message()).replace("Value error, ", "")
    if not hasattr(error.__cause__, "errors") or "Input should be " not in message:
        return message
    option, must = message.removeprefix("Invalid value for ").split(": Input should be ", 1)
    option, must, given = option.strip("'"), must.partition(", ")[0], error.__cause__.errors()[0]["input"]
    return f"{option} must be {must}, is {given!r}."


def _way_on(error: Any) -> str:
    """Where to look; or, of an option that a command has and stands before it, where it belongs."""
    context, option = getattr(error, "ctx", None), getattr(error, "option_name", None)
    where = getattr(context, "command_path", "lora-merge")
    if option and hasattr(getattr(context, "command", None), "commands"):
        return f"An option goes after the command that it is of: {where} COMMAND … {option}. {where} --help"
    return f"{where} --help"
