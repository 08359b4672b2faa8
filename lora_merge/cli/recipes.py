"""`lora-merge recipes`: list, show and copy the shipped recipes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_merge.cli.output import DebugOption, JsonOption, Output, QuietOption, plain

if TYPE_CHECKING:
    from rich.table import Table

    from lora_merge.recipe import LoadedRecipe

recipes_app = typer.Typer(help="The shipped recipes: what every client of a federation shares.", no_args_is_help=True)


def recipe_names() -> list[str]:
    """Of the shipped recipes, for a shell to complete."""
    from lora_merge.recipe_files import shipped

    return [path.stem for path in shipped()]


NameArgument = Annotated[
    str,
    typer.Argument(help="A shipped recipe's name; or, to look at your own, a YAML path.", autocompletion=recipe_names),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a setting that `lora-merge recipes show RECIPE` lists; may be repeated.",
    ),
]


@recipes_app.command("list")
def list_recipes(as_json: JsonOption = False, quiet: QuietOption = False, debug: DebugOption = False) -> None:
    """List the shipped recipes.

    Example: lora-merge recipes list
    """
    out = Output(as_json, quiet, debug)
    with out.reporting():
        from lora_merge.recipe_files import load, shipped

        recipes = [load(path.stem) for path in shipped()]
        names = [loaded.recipe.name for loaded in recipes]
        out.result({"recipes": [_record(loaded) for loaded in recipes]}, made=names, show=lambda: _table(recipes))


@recipes_app.command()
def show(
    name: NameArgument, as_json: JsonOption = False, quiet: QuietOption = False, debug: DebugOption = False
) -> None:
    """Print a recipe with its comments.

    Example: lora-merge recipes show laptop
    """
    out = Output(as_json, quiet, debug)
    with out.reporting():
        from lora_merge.recipe_files import load

        loaded = load(name)
        text = loaded.path.read_text(encoding="utf-8").rstrip()
        out.result(_record(loaded), made=text.split("\n"), show=lambda: f"{text}\n\n# digest {loaded.digest}")


@recipes_app.command()
def copy(
    name: Annotated[str, typer.Argument(help="A shipped recipe's name.", autocompletion=recipe_names)],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="The folder to copy into.")] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Replace files that are already there.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Copy a recipe and its script, to read and to edit.

    Example: lora-merge recipes copy laptop ours
    """
    out = Output(as_json, quiet, debug)
    with out.reporting():
        from lora_merge import recipe_files

        files = [str(path) for path in recipe_files.copy(name, destination, force=force)]
        out.result({"files": files}, made=files[0], show=lambda: "\n".join(files))


def _record(loaded: "LoadedRecipe") -> dict[str, Any]:
    return {"name": loaded.recipe.name, "digest": loaded.digest, "settings": loaded.recipe.settings()}


def _table(recipes: "list[LoadedRecipe]") -> "Table":
    from rich.table import Table

    table = Table("recipe", "base model", "r", "runs", "digest", box=None, pad_edge=False)
    for loaded in recipes:
        recipe = loaded.recipe
        runs = f"{recipe.epochs:g} epochs" if recipe.epochs is not None else f"{recipe.steps} steps"
        cells = (recipe.name, recipe.base_model, recipe.r, runs, loaded.digest[:12])
        table.add_row(*map(plain, cells))
    return table
