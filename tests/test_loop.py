"""A whole federation over a Hub, as its users type it: found, train and push, merge and publish, verify, load."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hub.server import LocalHub
from tests.publish.conftest import Run, hub, publisher, run, running_hub
from tests.training.conftest import RECIPE, base

__all__ = ["base", "hub", "publisher", "run", "running_hub"]

LOADED_BY_ITS_NAME = """
import sys, json, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(8)[None]
before = model(ids).logits
loaded = PeftModel.from_pretrained(model, "org/global")
print(json.dumps(float((loaded(ids).logits - before).abs().max())))
"""


def rows(path: Path, first: int) -> Path:
    lines = [json.dumps({"prompt": f"{n} and {n} is ", "completion": str(2 * n)}) for n in range(first, first + 12)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_three_clients_and_one_merge_over_a_hub(hub: LocalHub, base: Path, tmp_path: Path) -> None:
    def run(*command: str, who: str = "me", fails: int = 0) -> str:
        env = hub.env(token=tokens.get(who), cache=tmp_path / "cache" / who)
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == fails, done.stderr
        return done.stdout

    def lora_merge(*arguments: str, **options: Any) -> Any:
        return json.loads(run(sys.executable, "-m", "lora_merge", *arguments, "--json", **options))

    tokens = {name: hub.user(name, orgs={"org": "write"}) for name in ("me", "one", "two", "three", "other")}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**RECIPE, "steps": 2}))

    lora_merge("init", "org/federation", "--recipe", "tiny.yaml", "--base", str(base))
    for number, who in enumerate(("one", "two", "three")):
        data, client = str(rows(tmp_path / f"{who}.jsonl", 20 * number)), f"org/client-{who}"
        train = ("train", "org/federation", "--data", data, "--client-id", client, "--output", who)
        lora_merge(*train, "--base", str(base), "--push", client, who=who)
    merged = lora_merge("aggregate", "org/client-*", "--output", "global", "--push", "org/global")
    assert [each["source"] for each in merged["contributions"]] == [f"org/client-{n}" for n in ("one", "three", "two")]
    assert [each["commit"] for each in merged["contributions"]] == [
        hub.head(each["source"]) for each in merged["contributions"]
    ]

    found = lora_merge("verify", "org/global", who="other")
    assert (found["verdict"], found["inputs"]) == ("identical", 3)
    moved = run(sys.executable, "-c", LOADED_BY_ITS_NAME, str(base), who="other")
    assert float(moved.splitlines()[-1]) > 1e-4


@pytest.mark.parametrize("command", [("verify", "org/nothing"), ("aggregate", "org/nothing-*", "--output", "global")])
def test_what_is_not_on_the_hub_is_not_found(command: tuple[str, ...], run: Run) -> None:
    assert run(*command)[0] == 4
