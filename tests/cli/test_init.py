"""`lora-merge init`, and `train org/federation`: one name is all that clients need to agree on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_merge.federation.contract import FIXED
from lora_merge.recipe_files import folder as recipes_folder
from tests.hub.server import LocalHub
from tests.publish.conftest import Run, hub, publisher, run, running_hub
from tests.training.conftest import MakeRecipe, base, make_recipe, rows

__all__ = ["base", "hub", "make_recipe", "publisher", "rows", "run", "running_hub"]  # fixtures

REPO = "org/federation"
Founded = tuple[str, dict[str, Any]]
Train = Callable[..., tuple[int, str, str]]


@pytest.fixture
def founded(run: Run, hub: LocalHub, base: Path, make_recipe: MakeRecipe) -> Founded:
    """A federation of one step on the tiny model, which lies on the Hub: the model's commit, and what init said."""
    commit = hub.create("org/tiny", {path.name: path for path in base.iterdir()})
    code, out, err = run("init", REPO, "--recipe", make_recipe(steps=1), "--json")
    assert (code, err) == (0, "")
    return commit, json.loads(out)


@pytest.fixture
def train(run: Run, rows: Path) -> Train:
    def call(recipe: str = REPO, *more: str, output: str = "out") -> tuple[int, str, str]:
        given = ("--data", str(rows), "--client-id", "org/a", "--output", output, "--device", "cpu")
        return run("train", recipe, *given, *more)

    return call


def edit(hub: LocalHub, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Commit a changed file of the federation, as somebody else could."""
    data = yaml.safe_load(hub.read(REPO, name))  # JSON is YAML
    change(data)
    hub.commit(REPO, {name: json.dumps(data)})


def test_a_federation_is_settings_hashes_and_a_card(hub: LocalHub, founded: Founded) -> None:
    commit, record = founded
    assert sorted(hub.files(REPO)) == ["README.md", "lora_start.json", "recipe.yaml"]
    assert hub.repository(REPO).private
    assert len(hub.history(REPO)) == 2
    assert (record["commit"], record["modules"], record["recipe"]) == (hub.head(REPO), 14, "tiny")
    assert record["settings"]["base_commit"] == commit
    assert b"- lora-merge-federation" in hub.read(REPO, "README.md")
    assert hub.errors == []


def test_the_hubs_listing_gives_the_base_models_hash_that_its_folder_has(
    run: Run, hub: LocalHub, founded: Founded, base: Path, make_recipe: MakeRecipe
) -> None:
    _, from_hub = founded
    options = ("--recipe", make_recipe(steps=1), "--base", str(base), "--json")
    from_folder = json.loads(run("init", "org/other", *options)[1])
    assert from_hub["base_weights_sha256"] == from_folder["base_weights_sha256"]
    starts = [json.loads(hub.read(repo, "lora_start.json"))["lora_A_sha256"] for repo in (REPO, "org/other")]
    assert starts[0] == starts[1]


def test_founding_downloads_no_weights(hub: LocalHub, founded: Founded) -> None:
    assert hub.calls("GET */model.safetensors") == []
    assert hub.calls("GET *", origin="cdn") == hub.calls("GET /v1/chunks/*", origin="cdn")


def test_founding_twice_changes_nothing(run: Run, hub: LocalHub, founded: Founded, make_recipe: MakeRecipe) -> None:
    code, out, _ = run("init", REPO, "--recipe", make_recipe(steps=1))
    assert code == 0
    assert "nothing to change" in out
    assert len(hub.history(REPO)) == 2


def test_a_client_follows_it_and_states_the_commit(
    hub: LocalHub, founded: Founded, train: Train, tmp_path: Path
) -> None:
    commit, record = founded
    code, _, err = train(REPO, "--push", "org/a")
    assert code == 0, err
    for text in ((tmp_path / "out" / "lora_merge.json").read_bytes(), hub.read("org/a", "lora_merge.json")):
        statement = json.loads(text)
        assert statement["recipe"]["name"] == f"{REPO}@{record['commit']}"
        assert statement["recipe"]["digest"] == record["digest"]
        assert statement["base_model"]["commit"] == commit
        assert statement["seed_lora_A"] == 7


def test_a_client_trains_the_same_as_by_the_recipes_file(
    founded: Founded, train: Train, base: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    assert train(REPO)[0] == 0
    assert train(make_recipe(steps=1), "--base", str(base), output="by-file")[0] == 0
    one, two = (tmp_path / name / "adapter_model.safetensors" for name in ("out", "by-file"))
    assert one.read_bytes() == two.read_bytes()


def test_a_revision_may_be_named(hub: LocalHub, founded: Founded, train: Train, tmp_path: Path) -> None:
    _, record = founded
    hub.tag(REPO, "v1")
    hub.commit(REPO, {"recipe.yaml": "nonsense"})
    assert train(REPO)[0] == 3
    assert train(f"{REPO}@v1")[0] == 0
    statement = json.loads((tmp_path / "out" / "lora_merge.json").read_text())
    assert statement["recipe"]["name"] == f"{REPO}@{record['commit']}"


@pytest.mark.usefixtures("founded")
@pytest.mark.parametrize("key", FIXED)
def test_no_client_may_leave_the_federation(train: Train, tmp_path: Path, key: str) -> None:
    code, _, err = train(REPO, "--set", f"{key}=1")
    assert code == 2
    assert f"all clients of {REPO} share this setting" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("founded")
def test_what_a_client_may_set_otherwise_is_stated(train: Train, tmp_path: Path) -> None:
    assert train(REPO, "--set", "micro_batch_size=2")[0] == 0
    statement = json.loads((tmp_path / "out" / "lora_merge.json").read_text())
    assert statement["recipe"]["overrides"] == {"micro_batch_size": 2}


@pytest.mark.usefixtures("founded")
@pytest.mark.parametrize("script", ["../evil.py", "/srv/evil.py", "evil.py", "https://x/evil.py", "text.sh"])
def test_only_a_shipped_script_is_run(hub: LocalHub, train: Train, tmp_path: Path, script: str) -> None:
    mark = tmp_path / "ran"
    hub.commit(REPO, {"evil.py": f"open({str(mark)!r}, 'w')\n", "text.py": f"open({str(mark)!r}, 'w')\n"})
    edit(hub, "recipe.yaml", lambda data: data.update(script=script))
    code, _, err = train(REPO)
    assert code in (3, 4)
    assert "script" in err
    assert not mark.exists()


@pytest.mark.usefixtures("founded")
def test_a_script_of_the_repository_is_never_read(hub: LocalHub, train: Train, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    hub.commit(REPO, {"text.py": f"open({str(mark)!r}, 'w')\n"})
    assert train(REPO)[0] == 0
    assert not mark.exists()
    assert hub.calls("GET */text.py") == hub.calls("HEAD */text.py") == []


def test_a_script_that_is_not_shipped_founds_no_federation(
    run: Run, hub: LocalHub, make_recipe: MakeRecipe, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "ours.py").write_text("")
    code, _, err = run("init", REPO, "--recipe", make_recipe(script="ours.py"), "--base", str(base))
    assert code == 2
    assert "settings only" in err
    assert REPO not in hub.state.repositories


@pytest.mark.usefixtures("founded")
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("recipe.yaml", lambda data: data.update(surprise=1)),
        ("recipe.yaml", lambda data: data.update(r="four")),
        ("recipe.yaml", lambda data: data.pop("r")),
        ("recipe.yaml", lambda data: data.update(seed_lora_A=8)),
        ("recipe.yaml", lambda data: data.update(base_commit=None)),
        ("lora_start.json", lambda data: data.update(surprise=1)),
        ("lora_start.json", lambda data: data.pop("base_commit")),
        ("lora_start.json", lambda data: data.update(schema_version=2)),
        ("lora_start.json", lambda data: data.update(lora_A_sha256={})),
        ("lora_start.json", lambda data: data.update(lora_A_sha256={"a b": "0" * 64})),
        ("lora_start.json", lambda data: data.update(lora_A_sha256=[])),
        ("lora_start.json", lambda data: data.update(base_weights_sha256="x")),
        ("lora_start.json", lambda data: data.update(base_model="org/other")),
    ],
)
def test_a_contract_that_is_not_strictly_one_is_refused(
    hub: LocalHub, train: Train, tmp_path: Path, name: str, change: Callable[[dict[str, Any]], None]
) -> None:
    edit(hub, name, change)
    code, _, err = train(REPO)
    assert code == 3, err
    assert REPO in err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("founded")
@pytest.mark.parametrize("text", [b"\xff\xfe", b"[1, 2]", b"a: &a [*a]", b"- " * 5000, b"!!python/object:os.system x"])
def test_a_recipe_that_is_no_recipe_is_refused(hub: LocalHub, train: Train, text: bytes) -> None:
    hub.commit(REPO, {"recipe.yaml": text})
    assert train(REPO)[0] == 3


@pytest.mark.usefixtures("founded")
def test_a_start_that_does_not_come_out_bit_for_bit_stops_before_training(
    hub: LocalHub, train: Train, tmp_path: Path
) -> None:
    def change(data: dict[str, Any]) -> None:
        data["lora_A_sha256"]["model.layers.0.mlp.up_proj"] = "0" * 64

    edit(hub, "lora_start.json", change)
    code, _, err = train(REPO)
    assert code == 8
    assert "in 1 modules: model.layers.0.mlp.up_proj" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("founded")
def test_other_weights_of_the_base_stop_before_training(hub: LocalHub, train: Train, tmp_path: Path) -> None:
    edit(hub, "lora_start.json", lambda data: data.update(base_weights_sha256="0" * 64))
    code, _, err = train(REPO)
    assert code == 8
    assert "are not those" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("founded")
@pytest.mark.parametrize("name", ["recipe.yaml", "lora_start.json"])
def test_a_flipped_bit_on_the_way_is_not_taken_for_the_contract(hub: LocalHub, train: Train, name: str) -> None:
    hub.commit(REPO, {name: hub.read(REPO, name) + b"\n\n"})  # bytes that no cache has yet
    fault = hub.fault(f"GET */{name}", "flip", times=None)
    code, _, err = train(REPO)
    assert code == 3
    assert name in err
    assert fault.hits == 2
    hub.clear_faults()
    assert train(REPO)[0] == 0


def test_a_repository_that_is_no_federation_and_one_that_is_not_there(hub: LocalHub, train: Train) -> None:
    hub.create("org/model", {"config.json": "{}"})
    code, _, err = train("org/model")
    assert code == 4
    assert "org/model is not a federation" in err
    assert train("org/nothing")[0] == 4


def test_an_adapters_repository_is_no_place_for_a_federation(
    run: Run, hub: LocalHub, base: Path, make_recipe: MakeRecipe
) -> None:
    head = hub.create(REPO, {"adapter_config.json": "{}"})
    assert run("init", REPO, "--recipe", make_recipe(), "--base", str(base))[0] == 2
    assert hub.head(REPO) == head


def test_no_access_is_said_before_anything_is_read(run: Run, hub: LocalHub) -> None:
    code, _, err = run("init", "other/federation", "--recipe", "laptop")
    assert code == 4
    assert "may not write to other" in err
    assert len(hub.calls("* /api/*")) == 1


def test_every_shipped_recipe_names_a_shipped_script() -> None:
    for path in recipes_folder().glob("*.yaml"):
        assert (recipes_folder() / yaml.safe_load(path.read_text())["script"]).is_file()
