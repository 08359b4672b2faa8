"""Adapters from the Hub: what a source names, that it is pinned, and what is asked for."""

import json
import re
from pathlib import Path

import pytest

from lora_merge.cli.forecast import UNJUDGED
from lora_merge.pipeline import aggregate
from tests.conftest import digests
from tests.hub.server import LocalHub
from tests.sources.federation import Puller, adapter, publish, write

ALLOWED = ("adapter_config.json", "adapter_model.safetensors", "lora_merge.json", "aggregation.json")
COLLECTION = "org/the-clients-0123456789abcdef01234567"


def test_a_pattern_gives_the_bytes_that_folders_give(hub: LocalHub, pull: Puller, tmp_path: Path) -> None:
    commits = publish(hub, 3)
    ran = pull("org/client-*", "-o", "global", "--json")
    assert ran.code == 0
    folders = [
        write(tmp_path / repo, adapter(repo, num_examples=10 * i + 10, seed=i)) for i, repo in enumerate(commits)
    ]
    aggregate(folders, tmp_path / "local")
    ours, theirs = digests(tmp_path / "global"), digests(tmp_path / "local")
    assert ours["adapter_model.safetensors"] == theirs["adapter_model.safetensors"]
    recorded = {entry["source"]: entry["commit"] for entry in ran.json["contributions"]}
    assert recorded == commits
    local = json.loads((tmp_path / "local" / "aggregation.json").read_text())["contributions"]
    assert [entry["sha256"] for entry in ran.json["contributions"]] == [entry["sha256"] for entry in local]
    assert [(entry["source"], entry["commit"]) for entry in local] == [(f"client-{i}", None) for i in range(3)]


def test_two_calls_of_the_api_a_client_and_one_for_all(hub: LocalHub, pull: Puller) -> None:
    publish(hub, 3)
    assert pull("org/client-*", "-o", "global").code == 0
    xet = bool(hub.calls("GET */xet-read-token/*"))
    assert len(hub.calls("* /api/*")) == 1 + (2 if xet else 1) * 3
    hub.clear_calls()
    assert pull("org/client-*", "-o", "global", "--force").code == 0
    assert len(hub.calls("* /api/*")) == 1 + 3
    assert len(hub.calls()) == 1 + 3, "what is in the cache is not asked for again"


def test_named_repositories_take_one_call_each(hub: LocalHub, pull_once: Puller) -> None:
    publish(hub, 3)
    assert pull_once("org/client-0", "org/client-1", "org/client-2", "-o", "global").code == 0
    assert len(hub.calls("* /api/*")) == 3


def test_everything_is_read_at_the_pinned_commit(hub: LocalHub, pull: Puller) -> None:
    commits = publish(hub, 3)
    assert pull("org/client-*", "-o", "global").code == 0
    for call in hub.calls("* /org/*/resolve/*") + hub.calls("GET /api/models/org/*"):
        repo = re.search(r"org/client-\d", call.path)
        assert repo
        assert f"/{commits[repo.group()]}" in call.path


@pytest.mark.parametrize("revision", ["v1", "old", "commit"])
def test_a_revision_is_a_tag_a_branch_or_a_commit(hub: LocalHub, pull_once: Puller, revision: str) -> None:
    commits = publish(hub, 2)
    for repo in commits:
        hub.tag(repo, "v1")
        hub.branch(repo, "old")
        hub.commit(repo, adapter(repo, seed=99))
    sources = [f"{repo}@{commits[repo] if revision == 'commit' else revision}" for repo in commits]
    found = pull_once(*sources, "--dry-run", "--json").json
    assert {client["source"]: client["commit"] for client in found["clients"]} == commits
    if revision == "v1":
        found = pull_once("org/client-*@v1", "--dry-run", "--json").json
        assert {client["source"]: client["commit"] for client in found["clients"]} == commits


def test_a_pattern_matches_whole_names_and_case(hub: LocalHub, pull_once: Puller) -> None:
    for name in ("client-1", "client-2", "Client-3", "my-client-4", "client"):
        hub.create(f"org/{name}", adapter(f"org/{name}"))
    hub.create("other/client-5", adapter("other/client-5"))
    found = pull_once("org/client-*", "--dry-run", "-q")
    assert [line.partition("@")[0] for line in found.out.splitlines()] == ["org/client-1", "org/client-2"]
    found = pull_once("org/[cC]lient-[13]", "--dry-run", "-q")
    assert [line.partition("@")[0] for line in found.out.splitlines()] == ["org/Client-3", "org/client-1"]


def test_more_repositories_than_a_page_has_are_all_found(hub: LocalHub, pull_once: Puller) -> None:
    publish(hub, 5)
    hub.state.page_size = 2
    assert len(pull_once("org/client-*", "--dry-run", "--json").json["clients"]) == 5
    assert len(hub.calls("GET /api/models")) == 3


def test_a_collection_by_its_slug_and_by_its_address(hub: LocalHub, pull_once: Puller) -> None:
    publish(hub, 3)
    hub.collection(COLLECTION, ["org/client-2", "org/client-0"])
    for source in (COLLECTION, f"{hub.url}/collections/{COLLECTION}", f"hf://collections/{COLLECTION}"):
        found = pull_once(source, "--dry-run", "--json").json
        assert [client["source"] for client in found["clients"]] == ["org/client-0", "org/client-2"]


def test_hf_addresses_and_ids_on_standard_input(hub: LocalHub, pull_once: Puller) -> None:
    publish(hub, 4)
    hub.tag("org/client-1", "v1")
    lines = f"# ours\nhf://org/client-0\n\n{hub.url}/org/client-1/tree/v1\norg/client-2\n"
    found = pull_once("-", "hf://models/org/client-3", "--dry-run", "--json", lines=lines).json
    assert [client["source"] for client in found["clients"]] == [f"org/client-{i}" for i in range(4)]
    assert pull_once("-", "-o", "global", lines="\n# none\n").code == 4


def test_a_folder_wins_over_a_repository_and_says_so(hub: LocalHub, pull_once: Puller) -> None:
    publish(hub, 2)
    for name in ("client-0", "more/client-2", "client-3"):
        write(pull_once.folder / "org" / name, adapter(f"org/{Path(name).name}"))
    sources = ("org/client-0", "hf://org/client-1", "org/more/client-2", "org/client-[3]", "./org/client-3/../client-3")
    ran = pull_once(*sources[:4], "--dry-run", "--json")
    assert [client["commit"] is None for client in ran.json["clients"]] == [True, False, True, True]
    ran = pull_once(*sources[:4], "--dry-run")
    here = "Folders here, read from this machine: org/client-0. Of the Hub: hf://org/client-0"
    assert ran.err == f"{here}\n{UNJUDGED}\n"
    assert pull_once(*sources[:4], "--dry-run", "-q").err == ""
    assert "machine: org/client-0, org/client-3. " in pull_once("org/client-0", "org/client-3", "--dry-run").err
    ran = pull_once("hf://org/client-1", sources[2], sources[4], "--dry-run")
    assert ran.err == f"{UNJUDGED}\n", "no repository is called so"


def test_a_pattern_leaves_out_what_is_no_clients_and_says_so(hub: LocalHub, pull_once: Puller) -> None:
    publish(hub, 2)
    assert pull_once("org/client-*", "-o", "global").code == 0
    files = {path.name: path.read_bytes() for path in (pull_once.folder / "global").iterdir()}
    hub.create("org/global", files)
    hub.create("org/federation", {"recipe.yaml": "{}", "lora_start.json": "{}"})
    ran = pull_once("org/*", "--dry-run", "-q")
    assert [line.partition("@")[0] for line in ran.out.splitlines()] == ["org/client-0", "org/client-1"]
    assert "org/* leaves out org/global (a merged adapter), org/federation (a federation's recipe)." in ran.err
    ran = pull_once("org/g*", "--dry-run")
    assert (ran.code, ran.err.splitlines()[0]) == (4, "error: org/g* matches only org/global (a merged adapter).")
    hub.collection(COLLECTION, ["org/client-0", "org/global"])
    ran = pull_once(COLLECTION, "--dry-run", "-q")
    assert [line.partition("@")[0] for line in ran.out.splitlines()] == ["org/client-0"]
    assert f"{COLLECTION} leaves out org/global (a merged adapter)." in ran.err


def test_a_merged_adapter_that_is_named_is_no_client(hub: LocalHub, pull_once: Puller) -> None:
    publish(hub, 2)
    assert pull_once("org/client-*", "-o", "global").code == 0
    hub.create("org/global", {path.name: path.read_bytes() for path in (pull_once.folder / "global").iterdir()})
    ran = pull_once("org/client-*", "org/global", "-o", "again", "--weights", "uniform")
    assert ran.code == 3
    assert "org/global: aggregation.json: is that of a merged adapter" in ran.err
    assert "--onto org/global." in ran.err


def test_a_repository_given_twice_is_refused(hub: LocalHub, pull_once: Puller) -> None:
    publish(hub, 2)
    ran = pull_once("org/client-*", "org/client-1", "-o", "global")
    assert (ran.code, ran.err) == (2, "error: org/client-1 is given twice.\n")


def test_only_the_files_that_a_merge_reads_are_downloaded(hub: LocalHub, pull: Puller) -> None:
    others = {"training_args.bin": b"x" * 5000, "README.md": "text", "adapter_model.bin": b"y" * 5000}
    hub.create("org/client-0", {**adapter("org/client-0"), **others})
    assert pull("org/client-*", "-o", "global").code == 0
    asked = {call.path.rpartition("/")[2] for call in hub.calls("* /org/*/resolve/*")}
    assert asked <= set(ALLOWED)


def test_a_dry_run_prints_the_plan_and_writes_nothing(hub: LocalHub, pull_once: Puller) -> None:
    commits = publish(hub, 2)
    ran = pull_once("org/client-*", "--dry-run")
    assert (ran.code, ran.err) == (0, f"{UNJUDGED}\n")
    rows = [re.split(r"\s{2,}", line) for line in ran.out.splitlines()]
    assert sum(map(len, adapter("org/client-0").values())) == 1604
    assert rows[1] == ["org/client-0"] * 2 + [commits["org/client-0"][:12], "10", "10", "33.3%", "1.6 kB", "1.6 kB"]
    assert [row[0].partition(":")[0] for row in rows[3:]] == ["2 clients", "memory"]
    assert not list(pull_once.folder.iterdir())
    assert not (pull_once.home / "hub").exists()
    assert pull_once("org/client-*", "-o", "global").code == 0
    assert [client["to_download"] for client in pull_once("org/client-*", "--dry-run", "--json").json["clients"]] == [
        0,
        0,
    ]


def test_weights_are_given_by_repository(hub: LocalHub, pull_once: Puller) -> None:
    publish(hub, 2)
    hub.tag("org/client-1", "v1")
    arguments = ["--weight", "org/client-0=1", "--weight", "org/client-1@v1=3", "--dry-run", "--json"]
    found = pull_once("org/client-0", "org/client-1@v1", *arguments).json
    assert [client["share"] for client in found["clients"]] == [0.25, 0.75]


def test_a_statement_of_another_id_is_said(hub: LocalHub, pull_once: Puller) -> None:
    hub.create("org/client-0", adapter("somebody/else"))
    ran = pull_once("org/client-0", "--dry-run", "--json")
    assert ran.json["clients"][0]["client_id"] == "somebody/else"
    assert ran.err.startswith("warning: org/client-0 states the client id somebody/else")


def test_two_repositories_that_claim_one_id_are_refused(hub: LocalHub, pull_once: Puller) -> None:
    hub.create("org/client-0", adapter("org/client-0"))
    hub.create("org/client-1", adapter("org/client-0"))
    ran = pull_once("org/client-*", "-o", "global")
    assert ran.code == 3
    assert "org/client-1: client_id: org/client-0 is claimed by org/client-0 too" in ran.err


def test_a_folder_of_an_organisations_name_hides_none_of_its_repositories(hub: LocalHub, pull_once: Puller) -> None:
    publish(hub, 2)
    write(pull_once.folder / "org" / "global", adapter("org/global"))
    ran = pull_once("org/client-0", "--dry-run", "--json")
    assert [client["commit"] is None for client in ran.json["clients"]] == [False]
    ran = pull_once("org/globl", "--dry-run")
    assert ran.code == 4
    assert "There is no folder org/globl here. There is no org/globl on the Hub, or it is private" in ran.err
    assert "Did you mean org/global?" in ran.err
    ran = pull_once("org/client-*", "--dry-run")  # clients to come may be waited for there
    assert ran.code == 4
    assert "Of the Hub: hf://org/client-*" in ran.err
