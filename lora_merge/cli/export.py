"""`lora-merge export`: the model with a global adapter merged into it."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lora_merge.cli.output import DebugOption, JsonOption, Output, QuietOption, plain
from lora_merge.cli.waiting import MaxWaitOption
from lora_merge.hub.waiting import MAX_WAIT, waiting_at_most


class FileType(StrEnum):
    """The float type of the written weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def export(
    adapter: Annotated[
        str, typer.Argument(metavar="GLOBAL", help="The merged adapter (or a client's): its folder, or ORG/NAME.")
    ],
    base: Annotated[str, typer.Option(help="The base model: a folder, or a repository id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The model folder to make.")],
    dtype: Annotated[FileType, typer.Option(help="Float type of the file; the sum is always in fp32.")] = FileType.fp32,
    force: Annotated[bool, typer.Option("--force", help="Replace the model that is at --output.")] = False,
    max_wait: MaxWaitOption = MAX_WAIT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the base model with the adapter's update merged in, in fp32: a model folder that needs no PEFT.

    Example: lora-merge export global --base org/base --output merged
    """
    out = Output(as_json, quiet, debug)
    with out.reporting(), waiting_at_most(max_wait):
        from lora_merge.evaluation.merged_model import export as export_model

        if dtype is not FileType.fp32:
            out.warn(f"{dtype.value} rounds the sum: a part of a small update is lost (bf16 lost 43 % of it once).")
        made = export_model(adapter, base, output, dtype=dtype.value, force=force, tell=out.say, warn=out.warn)
        record = {
            "output": str(made.output),
            "dtype": made.dtype,
            "parameters": made.parameters,
            "bytes": made.nbytes,
        }
        out.result(
            record,
            made=str(made.output),
            show=lambda: plain(
                f"{made.output}: {made.parameters / 1e6:.1f} M parameters in {made.dtype}, {made.nbytes / 1e6:.1f} MB"
            ),
        )
