"""The options that say whose adapters take part, and what may stop a merge of strangers' ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lora_merge.screening.stops import Screening

CapExamplesOption = Annotated[
    str | None, typer.Option(metavar="N", help="Count no client for more examples: a number, or 5x of the median.")
]
AllowDominantOption = Annotated[
    bool, typer.Option("--allow-dominant", help="Go on where one client's count is far above the others'.")
]
AllowOutliersOption = Annotated[
    bool, typer.Option("--allow-outliers", help="Go on where one update is far larger than the others.")
]
AllowMergedOption = Annotated[
    bool, typer.Option("--allow-merged", help="Take a merged adapter that is named as one more client.")
]
AllowListOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Refuse every source not in this file: one a line, or a *; no client ids."),
]
DropDuplicatesOption = Annotated[
    bool,
    typer.Option(
        "--drop-duplicates",
        help="Of equal or nearly equal updates, keep who is in already, else the first by client id.",
    ),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(metavar="SOURCE", help="Leave out a source or client id, or a pattern of them; may be repeated."),
]
SkipRejectedOption = Annotated[
    bool, typer.Option("--skip-rejected", help="Merge the others where some are refused; each is named.")
]


def screening_of(
    cap_examples: str | None,
    allow_dominant: bool,
    allow_outliers: bool,
    allow_list: Path | None,
    drop_duplicates: bool,
    exclude: Sequence[str] | None,
    skip_rejected: bool,
    allow_merged: bool,
) -> "Screening":
    """The options together."""
    from lora_merge.screening.stops import Screening

    return Screening(
        cap_examples,
        allow_dominant,
        allow_outliers,
        allow_list,
        tuple(exclude or ()),
        drop_duplicates,
        skip_rejected,
        allow_merged,
    )
