"""`init`: a federation is founded by publishing what all its clients will share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi

from lora_merge.errors import UsageError
from lora_merge.federation.contract import FILES, Start, contract_files
from lora_merge.hub.session import hub_session
from lora_merge.hub.waiting import Tell
from lora_merge.publish.commit import Published, publish
from lora_merge.publish.files import RecordFile
from lora_merge.publish.push import require_access_with, require_repository_name
from lora_merge.publish.repository import Content, Target
from lora_merge.recipe import LoadedRecipe, Recipe
from lora_merge.recipe_files import folder, load
from lora_merge.sources.base_models import INDEX_NAME, FoundBase, indexed, model_in, weights_digest, weights_sha256
from lora_merge.sources.listing import fetched, listing
from lora_merge.training.base_model import check_base, skeleton, unstarted_lora
from lora_merge.training.lora_start import seeded_start


@dataclass(frozen=True)
class Founded:
    """A federation that is published: its recipe as clients will run it, its start, the commit."""

    recipe: Recipe
    start: Start
    published: Published


def found(
    target: Target, recipe: str, overrides: Sequence[str], *, base: Path | None, max_wait: float, tell: Tell
) -> Founded:
    """Publish a recipe's settings and its start of lora_A as the federation `target`.

    The base model's commit is pinned, and the hash of its weights stated, from the Hub's listing; where `base` is
    given, from that folder, and nothing is asked of the Hub about it. No weights are loaded: shapes are enough.

    Raises:
        UsageError: the recipe names a script that is not shipped, or there is another thing in that repository.
        And what `push` raises.
    """
    require_repository_name(target.repo)
    loaded = load(recipe, overrides)
    _require_shipped(loaded)
    with hub_session(max_wait, tell) as api:
        require_access_with(api, target)
        settled, there, weights = _base(api, loaded.recipe, base)
        start = _start(settled, there, weights)
        files = [RecordFile(name, content) for name, content in contract_files(target.repo, settled, start).items()]
        published = publish(
            api,
            target,
            Content(files, kind=FILES, rivals=("adapter_config.json", "adapter_model.safetensors")),
            message=f"The federation's recipe: {settled.name}",
            tell=tell,
        )
    return Founded(settled, start, published)


def _require_shipped(loaded: LoadedRecipe) -> None:
    """Clients run the script of the recipe as their own version ships it, so it must be one of those."""
    if not (folder() / loaded.recipe.script).is_file():
        shipped = ", ".join(sorted(path.name for path in folder().glob("*.py")))
        raise UsageError(
            f"script {loaded.recipe.script}: a federation shares settings only, for a script that is shipped.",
            hint=f"There is {shipped}. A script of your own is handed on as a file, with its recipe.",
        )


def _base(api: HfApi, recipe: Recipe, base: Path | None) -> tuple[Recipe, FoundBase, str | None]:
    """The recipe with the base's commit pinned, a folder with the base's config, and the hash of its weights."""
    if base is not None:
        found = model_in(base, recipe.base_model)
        return recipe, found, weights_sha256(found.folder)
    commit, files = listing(api, recipe.base_model, recipe.base_commit)
    if "config.json" not in files:
        raise UsageError(f"{recipe.base_model} holds no config.json: it is not a model.")
    config = fetched(recipe.base_model, commit, files["config.json"])
    names = {"model.safetensors"}
    if INDEX_NAME in files:
        names = indexed(fetched(recipe.base_model, commit, files[INDEX_NAME]))
    hashes = {name: file.sha256 for name, file in files.items() if file.sha256 and name in names}
    weights = weights_digest(hashes) if len(hashes) == len(names) else None
    return replace(recipe, base_commit=commit), FoundBase(recipe.base_model, config.parent, commit), weights


def _start(recipe: Recipe, base: FoundBase, weights: str | None) -> Start:
    check_base(base, recipe)
    model = unstarted_lora(skeleton(base), recipe)
    hashes = seeded_start(model, recipe.seed_lora_A)
    return Start(recipe.base_model, recipe.base_commit, weights, recipe.seed_lora_A, hashes)
