"""Where recipes and their scripts are: shipped, by path, or copied."""

from collections.abc import Sequence
from pathlib import Path

from lora_merge.errors import NotFoundError, UsageError, meant
from lora_merge.recipe import FEDERATION, LoadedRecipe, read, what_is_wrong


def load(name_or_path: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe, by the name of a shipped one or the path of a YAML file.

    Args:
        name_or_path: `laptop`, or `./ours.yaml`.
        overrides: texts `KEY=VALUE`, the value read as YAML.

    Raises:
        NotFoundError: there is no such recipe.
        UsageError: settings are unknown, missing or wrong; all are named.
    """
    path = find(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a YAML file: {what_is_wrong(error)}") from error
    return read(text, path, overrides)


def folder() -> Path:
    """Where the shipped recipes are: inside the installed package, or in the checkout beside it."""
    package = Path(__file__).parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped() -> list[Path]:
    """The shipped recipes' YAML files, sorted by name."""
    return sorted(folder().glob("*.yaml"))


def find(name_or_path: str) -> Path:
    """The YAML file of a shipped recipe's name, or of a path (which holds a slash or ends in .yaml or .yml)."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or "/" in name_or_path or "\\" in name_or_path:
        if not path.is_file():
            raise NotFoundError(f"There is no recipe file {name_or_path}.", hint="lora-merge recipes list")
        return path
    names = [entry.stem for entry in shipped()]
    if name_or_path not in names:
        raise NotFoundError(
            f"There is no shipped recipe {name_or_path!r}{meant(name_or_path, names)}; there are {', '.join(names)}.",
            hint="lora-merge recipes list. A recipe of your own is given as a path: ./NAME.yaml",
        )
    return folder() / f"{name_or_path}.yaml"


def is_repository(recipe: str) -> bool:
    """Whether a recipe is given as a federation, `org/name` or `org/name@revision`. A file that is there is a file."""
    is_file = recipe.endswith((".yaml", ".yml")) or Path(recipe).is_file()
    return not is_file and FEDERATION.fullmatch(recipe) is not None


def script_of(loaded: LoadedRecipe) -> Path:
    """The script that a recipe names: beside its YAML file, else among the shipped ones.

    A script is never downloaded, and one that lies beside a federation's file in some cache is not run.
    """
    for place in (folder(),) if loaded.agreed else (loaded.path.parent, folder()):
        if (place / loaded.recipe.script).is_file():
            return place / loaded.recipe.script
    if loaded.agreed:
        raise NotFoundError(
            f"{loaded.name} names the script {loaded.recipe.script}, which this version does not ship.",
            hint="A federation's scripts are the shipped ones; another version of lora-merge may have it.",
        )
    raise NotFoundError(
        f"{loaded.path} names the script {loaded.recipe.script}, which is neither beside it nor shipped.",
        hint=f"Put {loaded.recipe.script} into {loaded.path.parent}, or copy a shipped one: lora-merge recipes copy",
    )


def copy(name: str, destination: Path, *, force: bool = False) -> list[Path]:
    """Copy a shipped recipe's YAML and script into the folder `destination`; returns the two new files.

    Raises:
        UsageError: a file is already there, and `force` is not set.
        StorageError: the disk is full or not writable.
    """
    from lora_merge.checkpoint.folder import write_file  # which a list of the names need not wait for

    loaded = load(name)
    sources = (loaded.path, script_of(loaded))
    targets = [destination / source.name for source in sources]
    if not force and (there := [str(target) for target in targets if target.exists()]):
        raise UsageError(f"Already there: {', '.join(there)}.", hint="--force replaces; or name another folder.")
    for source, target in zip(sources, targets, strict=True):
        write_file(target, source.read_text(encoding="utf-8"))
    return targets
