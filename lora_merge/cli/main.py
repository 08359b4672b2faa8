"""`lora-merge`: the application, and the table of its commands."""

import json
import sys

import typer

from lora_merge.cli.aggregate import aggregate
from lora_merge.cli.output import SCHEMA_VERSION, Output
from lora_merge.cli.recipes import recipes_app
from lora_merge.cli.train import train

app = typer.Typer(
    name="lora-merge",
    help="Merge LoRA adapters that were fine-tuned apart: one exact mean, no server, no rounds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "LORA_MERGE"},
)
app.command()(train)
app.command()(aggregate)
app.add_typer(recipes_app, name="recipes")


def main() -> None:
    """The console script. A wrong command line is exit 2, as JSON where ``--json`` was asked for."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        # The parser's own errors carry `format_message`; a command reports its errors itself.
        if not hasattr(error, "format_message"):
            raise
        code, message = 2, error.format_message()
        if "--json" in sys.argv:
            record = {"code": code, "message": message, "hint": "lora-merge --help"}
            print(json.dumps({"schema_version": SCHEMA_VERSION, "error": record}, indent=2))
        else:
            Output().usage_error(message)
    sys.exit(code)
