"""`lora-merge init`: found a federation on the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_merge.cli.output import DebugOption, JsonOption, Output, QuietOption, plain
from lora_merge.cli.push import PrivateOption, RepoArgument, target_of
from lora_merge.cli.recipes import SetOption, recipe_names
from lora_merge.cli.train import quieten
from lora_merge.cli.waiting import MaxWaitOption
from lora_merge.hub.waiting import MAX_WAIT, waiting_at_most

if TYPE_CHECKING:
    from lora_merge.federation.found import Founded


def init(
    repo: RepoArgument,
    recipe: Annotated[
        str,
        typer.Option(help="A shipped recipe's name, or the path of a YAML file.", autocompletion=recipe_names),
    ],
    set_: SetOption = None,
    base: Annotated[
        Path | None, typer.Option(help="A folder with the base model, where it is not to be looked up on the Hub.")
    ] = None,
    private: PrivateOption = None,
    max_wait: MaxWaitOption = MAX_WAIT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Publish what all clients of a federation share: a recipe's settings, and the start of lora_A.

    Example: lora-merge init org/federation --recipe laptop --public
    """
    out = Output(as_json, quiet, debug)
    with out.reporting(resume="The same command goes on; it sees what has been published."), waiting_at_most(max_wait):
        from lora_merge.federation.found import found

        quieten()
        target = target_of(repo, private, create_pr=False)
        founded = found(target, recipe, set_ or [], base=base, max_wait=max_wait, tell=out.say)
        if founded.recipe.base_commit is None and founded.start.base_weights_sha256 is None:
            out.warn(f"the base model {founded.recipe.base_model} is not pinned: clients may start from other weights.")
        out.result(_record(founded), made=founded.published.commit, show=lambda: plain(_summary(founded)))


def _record(founded: "Founded") -> dict[str, Any]:
    published, start = founded.published, founded.start
    return {
        "repo": published.repo,
        "commit": published.commit,
        "url": published.url,
        "private": published.private,
        "changed": list(published.changed),
        "recipe": founded.recipe.name,
        "digest": founded.recipe.digest(),
        "settings": founded.recipe.settings(),
        "base_weights_sha256": start.base_weights_sha256,
        "modules": len(start.lora_A_sha256),
    }


def _summary(founded: "Founded") -> str:
    published, recipe = founded.published, founded.recipe
    seen = "private" if published.private else "public"
    done = "founded" if published.changed else "nothing to change"
    return (
        f"{published.repo} ({seen}): {done}; recipe {recipe.name}, digest {recipe.digest()[:12]}, "
        f"lora_A of {len(founded.start.lora_A_sha256)} modules\ncommit {published.commit}\n"
        f"A client: lora-merge train {published.repo} --data FILE --client-id ORG/NAME --output DIR --push ORG/NAME"
    )
