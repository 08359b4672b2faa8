"""The option that bounds what a command waits for a busy Hub."""

from typing import Annotated, TypeAlias

import typer

MaxWaitOption: TypeAlias = Annotated[
    float, typer.Option(min=0, help="Seconds to wait for a busy Hub, all waits together.")
]
