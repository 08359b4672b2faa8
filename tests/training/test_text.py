"""A whole run of the text recipe on a tiny model: what it writes, and what it survives."""

import json
import math
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_merge import aggregate
from lora_merge.errors import ConflictError, NetworkError, NotFoundError, RefusedError, StorageError, UsageError
from lora_merge.recipe_files import folder, load
from lora_merge.sources.base_models import FoundBase, weights_sha256
from lora_merge.statement import Statement
from lora_merge.training.base_model import add_lora, load_model
from lora_merge.training.client import Trained
from lora_merge.training.fit import client_seed
from lora_merge.training.job import Job, Step, last_checkpoint
from lora_merge.training.lora_start import seeded_uniform
from tests.conftest import digests
from tests.training.conftest import LIBRARY_WARNINGS, MakeRecipe

pytestmark = LIBRARY_WARNINGS

SCRIPT = runpy.run_path(str(folder() / "text.py"))["train"]
Train = Callable[..., Trained]


@pytest.fixture
def train(base: Path, rows: Path, tmp_path: Path, make_recipe: MakeRecipe) -> Train:
    """`train(steps=2, client_id="org/b", …)`: run the recipe with those settings and that job."""

    def run(**changes: Any) -> Trained:
        ours = {key: changes.pop(key) for key in list(changes) if key in Job.__dataclass_fields__}
        overrides = changes.pop("overrides", ())
        job = {"data": str(rows), "client_id": "org/a", "output": tmp_path / "out", "base": base, "device": "cpu"}
        return SCRIPT(load(make_recipe(**changes), overrides), Job(**{**job, **ours}))  # type: ignore[no-any-return]

    return run


def tensors(trained: Trained) -> dict[str, torch.Tensor]:
    return load_file(trained.output / "adapter_model.safetensors")


def interrupt_at(step: int) -> Callable[[Step], None]:
    """What presses Ctrl-C once a step was told: the run stops after the next one."""

    def on_step(now: Step) -> None:
        if now.step == step:
            signal.raise_signal(signal.SIGINT)

    return on_step


def test_the_output_is_three_files_and_nothing_is_left_beside_them(train: Train, tmp_path: Path) -> None:
    trained = train()
    assert sorted(digests(trained.output)) == ["adapter_config.json", "adapter_model.safetensors", "lora_merge.json"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "rows.jsonl", "tiny.yaml"}


def test_nothing_in_the_output_names_a_local_path(train: Train, tmp_path: Path, base: Path) -> None:
    trained = train()
    content = b"".join(path.read_bytes() for path in trained.output.iterdir())
    for word in (str(tmp_path), str(base), str(Path.home()), base.name, "rows.jsonl", "tiny.yaml"):
        assert word.encode() not in content


def test_the_adapters_config_names_the_recipes_repository_and_loads_in_peft(train: Train, base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trained = train(target_modules=["q_proj", "o_proj"])
    config = json.loads((trained.output / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "org/tiny"
    assert "revision" not in config
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 8, True)
    assert config["target_modules"] == ["o_proj", "q_proj"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained.output)
    loaded = {name.replace(".default.", "."): value for name, value in model.state_dict().items() if "lora_" in name}
    written = tensors(trained)
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[name], written[name]) for name in written)
    assert any(value.any() for name, value in written.items() if "lora_B" in name)


def test_the_statement_states_the_run(train: Train, base: Path) -> None:
    trained = train(overrides=["steps=null", "epochs=2", "batch_size=5", "micro_batch_size=5"])
    stated = Statement.from_json(json.loads((trained.output / "lora_merge.json").read_text(encoding="utf-8")))
    assert stated == trained.statement
    assert (stated.client_id, stated.num_examples, stated.steps, stated.local_epochs) == ("org/a", 10, 4, 2.0)
    assert stated.tokens == 2 * sum(len(f"{n} and {n} is {2 * n}") + 1 for n in range(10))
    assert stated.seed_lora_A == 7
    assert (stated.base_model.repo, stated.base_model.commit) == ("org/tiny", None)
    assert stated.base_model.weights_sha256 == weights_sha256(base)
    assert stated.recipe is not None
    assert (stated.recipe.name, stated.recipe.prompt_form) == ("tiny", "plain")
    assert stated.recipe.overrides == {"batch_size": 5, "epochs": 2.0, "micro_batch_size": 5, "steps": None}
    assert stated.trained_at["start"] <= stated.trained_at["end"]
    assert {"lora_merge", "torch", "transformers", "peft", "python"} == set(stated.versions)


def test_clients_that_froze_lora_A_are_merged_exactly_by_ffa(train: Train, base: Path, tmp_path: Path) -> None:
    settings = {"freeze_lora_A": True, "target_modules": ["q_proj", "o_proj"]}
    clients = [train(client_id=f"org/{name}", output=tmp_path / name, seed=ord(name), **settings) for name in "ab"]
    first, second = map(tensors, clients)
    assert all(torch.equal(first[name], second[name]) for name in first if "lora_A" in name)
    assert not any(torch.equal(first[name], second[name]) for name in first if "lora_B" in name)
    merged = aggregate([client.output for client in clients], tmp_path / "global", method="ffa")
    assert merged.ledger.ranks == [4]
    assert merged.ledger.certificate.whole is not None
    assert merged.ledger.certificate.whole["relative_error"] < 1e-6


def test_an_embeddings_lora_A_cannot_be_frozen(train: Train) -> None:
    with pytest.raises(UsageError, match="embedding"):
        train(freeze_lora_A=True, target_modules=["embed_tokens"])


def test_a_run_shorter_than_an_epoch_counts_the_rows_that_it_trained_on(train: Train) -> None:
    assert train(steps=2, batch_size=4).statement.num_examples == 8


def test_training_lowers_the_loss(train: Train) -> None:
    fitted = train(steps=30, lora_dropout=0.0, learning_rate=0.03).fitted
    assert fitted.steps == 30
    assert fitted.loss_last < 0.8 * fitted.loss_first


def test_after_one_step_lora_A_is_still_the_shared_start(train: Train, tmp_path: Path) -> None:
    """lora_B was zero, so lora_A had no gradient: what two clients wrote is what the seed drew."""
    one = tensors(train(steps=1, lora_dropout=0.0))
    other = tensors(train(steps=1, lora_dropout=0.0, client_id="org/b", output=tmp_path / "b"))
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"
    assert torch.equal(one[name], seeded_uniform(7, "model.layers.1.self_attn.o_proj", (4, 16), 1 / 4))
    assert all(torch.equal(one[key], other[key]) for key in one if "lora_A" in key)


def test_the_same_client_twice_gives_the_same_bytes_and_another_client_another_order(
    train: Train, tmp_path: Path
) -> None:
    runs = [
        train(output=tmp_path / "a"),
        train(output=tmp_path / "b"),
        train(output=tmp_path / "c", client_id="org/b"),
    ]
    first, second, third = (digests(run.output)["adapter_model.safetensors"] for run in runs)
    assert first == second != third


def test_a_clients_seed_is_fixed_by_the_recipes_seed_and_its_id(make_recipe: MakeRecipe) -> None:
    recipe = load(make_recipe()).recipe
    assert client_seed(recipe, "org/a") == client_seed(load(make_recipe(steps=9)).recipe, "org/a")
    assert client_seed(recipe, "org/a") != client_seed(recipe, "org/b")
    assert client_seed(recipe, "org/a") != client_seed(load(make_recipe(seed=2)).recipe, "org/a")


def test_micro_batches_do_not_change_the_result(train: Train, tmp_path: Path) -> None:
    whole = tensors(train(lora_dropout=0.0))
    split = tensors(train(lora_dropout=0.0, micro_batch_size=1, output=tmp_path / "split"))
    assert all(torch.allclose(whole[name], split[name], atol=1e-4) for name in whole)


def test_bf16_keeps_lora_in_fp32_and_comes_close_to_fp32(train: Train, tmp_path: Path) -> None:
    full = train(lora_dropout=0.0)
    half = train(lora_dropout=0.0, dtype="bf16", output=tmp_path / "half")
    assert {value.dtype for value in tensors(half).values()} == {torch.float32}
    assert half.fitted.loss_first == pytest.approx(full.fitted.loss_first, rel=1e-2)
    assert half.fitted.loss_first != full.fitted.loss_first


def test_lora_is_fp32_on_a_bf16_base(base: Path, make_recipe: MakeRecipe) -> None:
    recipe = load(make_recipe(dtype="bf16")).recipe
    model = add_lora(load_model(FoundBase("org/tiny", base, None), "bf16"), recipe)
    dtypes = {("lora_" in name, value.dtype, value.requires_grad) for name, value in model.named_parameters()}
    assert dtypes == {(True, torch.float32, True), (False, torch.bfloat16, False)}


def test_every_step_is_told_with_its_rate_and_time_left(train: Train) -> None:
    told: list[Step] = []
    trained = train(steps=3, on_step=told.append)
    assert [(step.step, step.steps) for step in told] == [(1, 3), (2, 3), (3, 3)]
    assert told[-1].tokens == trained.statement.tokens
    assert told[-1].seconds_left == 0 < told[0].seconds_left
    assert all(step.tokens_per_second > 0 and math.isfinite(step.loss) for step in told)


def test_an_interrupted_run_leaves_no_output_and_resumes_to_the_same_bytes(train: Train, tmp_path: Path) -> None:
    expected = digests(train(output=tmp_path / "whole").output)["adapter_model.safetensors"]
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(on_step=interrupt_at(2))
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "out").exists()
    said: list[str] = []
    resumed = train(resume=True, tell=said.append)
    assert "Going on from checkpoint-3" in said
    assert digests(resumed.output)["adapter_model.safetensors"] == expected
    assert (resumed.statement.steps, resumed.fitted.steps) == (6, 6)
    assert not list(tmp_path.glob(".*"))


def test_an_interrupt_after_the_last_step_does_not_throw_the_run_away(train: Train) -> None:
    assert train(on_step=interrupt_at(6)).fitted.steps == 6


def test_a_second_interrupt_stops_at_once(train: Train, tmp_path: Path) -> None:
    def twice(step: Step) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(on_step=twice)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def waiting(train: Train, tmp_path: Path) -> Job:
    """The job of a run that was interrupted after its third step."""
    with pytest.raises(KeyboardInterrupt):
        train(on_step=interrupt_at(2))
    return Job("", "org/a", tmp_path / "out")


def test_a_waiting_run_is_not_dropped_unless_asked(train: Train, waiting: Job) -> None:
    with pytest.raises(UsageError, match="An interrupted run is waiting"):
        train()
    assert last_checkpoint(waiting) is not None
    assert train(force=True).fitted.steps == 6
    assert not waiting.work.exists()


@pytest.mark.parametrize("change", ["data", "client_id", "learning_rate", "base"])
def test_a_run_does_not_resume_with_something_else(
    change: str, train: Train, waiting: Job, tmp_path: Path, base: Path
) -> None:
    (tmp_path / "other.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    changes: dict[str, Any] = {
        "data": {"data": str(tmp_path / "other.jsonl")},
        "client_id": {"client_id": "org/b"},
        "learning_rate": {"overrides": ["learning_rate=0.5"]},
        "base": {"base": other_weights(base, tmp_path / "other")},
    }
    with pytest.raises(UsageError, match="is of another run"):
        train(resume=True, **changes[change])
    assert last_checkpoint(waiting) is not None


def test_a_checkpoint_that_was_cut_off_is_passed_over(train: Train, waiting: Job) -> None:
    (waiting.work / "checkpoint-5").mkdir()
    (waiting.work / "checkpoint-5" / "trainer_state.json").write_text('{"glo', encoding="utf-8")
    said: list[str] = []
    train(resume=True, tell=said.append)
    assert "Going on from checkpoint-3" in said


@pytest.mark.parametrize("room", [1, 2000, 20_000], ids=["the mark", "its files", "the optimiser"])
def test_where_a_run_finds_no_room_it_names_the_place_and_leaves_nothing(
    room: int, base: Path, rows: Path, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_merge.training.fit.CHECKPOINT_SECONDS", 0.0)
    recipe = load(make_recipe())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(StorageError, match=re.escape(str(tmp_path / ".out.training"))):
            SCRIPT(recipe, Job(str(rows), "org/a", tmp_path / "out", base, "cpu"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [*tmp_path.glob(".*"), *tmp_path.glob("out")] == []


def test_resume_without_a_checkpoint_starts_anew_and_says_so(train: Train) -> None:
    said: list[str] = []
    assert train(resume=True, tell=said.append).fitted.steps == 6
    assert "No checkpoint to go on from: starting anew" in said


@pytest.mark.parametrize("of", ["no checkpoint", "a checkpoint"])
def test_while_a_run_lasts_no_other_one_takes_its_output(of: str, train: Train, tmp_path: Path) -> None:
    expected = digests(train(output=tmp_path / "alone").output)["adapter_model.safetensors"]
    (tmp_path / "other.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    refused: list[str] = []

    def another(now: Step) -> None:
        if now.step == 4:
            for changes in ({}, {"force": True}, {"resume": True}):
                with pytest.raises(ConflictError, match="Another run trains into") as caught:
                    train(data=str(tmp_path / "other.jsonl"), **changes)
                refused.append(caught.value.message)

    if of == "a checkpoint":
        with pytest.raises(KeyboardInterrupt):
            train(on_step=interrupt_at(2))
    trained = train(resume=of == "a checkpoint", on_step=another)
    assert len(refused) == 3
    assert digests(trained.output)["adapter_model.safetensors"] == expected
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_run_held_is_free_at_once(
    train: Train, base: Path, rows: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe, work = make_recipe(steps=100_000), tmp_path / ".out.training"
    command = [sys.executable, str(folder() / "text.py"), recipe, "--data", str(rows), "--client-id", "org/a"]
    command += ["--output", str(tmp_path / "out"), "--base", str(base), "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not (work / "run.json").exists():
            time.sleep(0.05)
            assert process.poll() is None
        with pytest.raises(ConflictError):
            train()
        process.kill()
    assert work.is_dir()
    assert train().fitted.steps == 6
    assert not work.exists()


def test_the_processes_of_torchrun_are_one_run(base: Path, rows: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(folder() / "text.py")]
    command += [make_recipe(steps=2), "--data", str(rows), "--client-id", "org/a"]
    command += ["--output", str(tmp_path / "out"), "--base", str(base), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(digests(tmp_path / "out")) == 3
    assert not list(tmp_path.glob(".*"))


def test_an_output_that_is_taken_is_never_replaced_unasked(train: Train, tmp_path: Path) -> None:
    first = digests(train(steps=1).output)
    for resume in (False, True):
        with pytest.raises(UsageError, match="already holds an adapter"):
            train(steps=2, resume=resume)
    assert digests(tmp_path / "out") == first
    assert digests(train(steps=2, force=True).output) != first


def test_an_adapter_that_somebody_makes_meanwhile_is_left_and_what_was_trained_lies_beside_it(
    train: Train, tmp_path: Path
) -> None:
    expected = digests(train(output=tmp_path / "alone").output)["adapter_model.safetensors"]
    theirs = digests(train(output=tmp_path / "theirs", steps=1).output)
    (tmp_path / "out-2").touch()

    def make(now: Step) -> None:
        if now.step == 4:
            shutil.copytree(tmp_path / "theirs", tmp_path / "out")

    with pytest.raises(KeyboardInterrupt):  # so that there is a checkpoint, too
        train(on_step=interrupt_at(2))
    with pytest.raises(ConflictError, match="out in the meantime") as caught:
        train(resume=True, on_step=make)
    assert digests(tmp_path / "out") == theirs
    assert f"lies in {tmp_path / 'out-3'}" in caught.value.hint
    assert digests(tmp_path / "out-3")["adapter_model.safetensors"] == expected
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out", "out-2", "out-3"]


def test_a_waiting_run_replaces_an_adapter_only_by_force(train: Train, waiting: Job, tmp_path: Path) -> None:
    theirs = digests(train(output=tmp_path / "theirs", steps=1).output)
    shutil.copytree(tmp_path / "theirs", tmp_path / "out")
    with pytest.raises(UsageError, match="already holds an adapter") as caught:
        train(resume=True)
    assert "--resume --force" in caught.value.hint
    assert digests(tmp_path / "out") == theirs
    said: list[str] = []
    assert train(resume=True, force=True, tell=said.append).fitted.steps == 6
    assert "Going on from checkpoint-3" in said
    assert not waiting.work.exists()


@pytest.mark.parametrize("name", ["x" * 250, "new/deep/out"])
def test_a_run_into_a_long_name_or_new_folders_is_one_as_any_other(
    name: str, train: Train, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(output=tmp_path / name, on_step=interrupt_at(2))
    assert train(output=tmp_path / name, resume=True).fitted.steps == 6
    assert [path.name for path in (tmp_path / name).parent.glob(".*")] == []


def test_a_run_that_fails_before_its_first_checkpoint_leaves_no_new_folders(train: Train, tmp_path: Path) -> None:
    def fail(now: Step) -> None:
        raise StorageError("no room")

    with pytest.raises(StorageError):
        train(output=tmp_path / "new" / "deep" / "out", on_step=fail)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("inside", [True, False], ids=["in an adapter", "too long"])
def test_a_place_where_nothing_can_be_written_is_said_before_any_step(
    inside: bool, train: Train, tmp_path: Path
) -> None:
    adapter = train(steps=1).output
    said: list[str] = []
    with pytest.raises(UsageError, match="which is an adapter" if inside else "too long"):
        train(output=adapter / "deep" if inside else tmp_path / ("x" * 256), tell=said.append)
    assert said == []


def test_a_folder_with_other_files_is_never_replaced_even_with_force(train: Train, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("dear", encoding="utf-8")
    with pytest.raises(UsageError, match=r"other files \(thesis\.tex\)"):
        train(force=True)
    assert (tmp_path / "out" / "thesis.tex").read_text(encoding="utf-8") == "dear"


def test_a_file_or_a_link_at_the_output_is_refused(train: Train, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(UsageError, match="is not a folder"):
            train(output=tmp_path / name, force=True)


def test_a_loss_that_is_no_number_stops_the_run(train: Train, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="training has come apart"):
        train(base=other_weights(base, tmp_path / "broken", value=float("nan")))
    assert {path.name for path in tmp_path.iterdir()} == {"broken", "rows.jsonl", "tiny.yaml"}


@pytest.mark.parametrize("client_id", ["", "a b", "../x", "a/b/c", "-x", "é"])
def test_a_malformed_client_id_is_refused(client_id: str, train: Train) -> None:
    with pytest.raises(UsageError, match="--client-id"):
        train(client_id=client_id)


def test_wrong_settings_for_the_base_are_told_before_its_weights_are_read(
    train: Train, base: Path, tmp_path: Path
) -> None:
    hollow = tmp_path / "hollow"
    shutil.copytree(base, hollow)
    (hollow / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UsageError, match="target_modules c_attn: org/tiny has no such module") as caught:
        train(base=hollow, target_modules=["q_proj", "c_attn"])
    assert "q_proj" in caught.value.hint
    with pytest.raises(UsageError, match="max_length 65: org/tiny reads at most 64 tokens"):
        train(base=hollow, max_length=65)
    for refused in ({"r": 1025}, {"r": 2, "lora_alpha": 2001}):
        with pytest.raises(UsageError, match="no merge takes a client of a rank above 1024, or of a scaling"):
            train(base=hollow, **refused)
    with pytest.raises(RefusedError, match="max_length 3"):
        train(base=hollow, max_length=3)


def test_a_base_folder_that_is_no_model_is_refused(train: Train, base: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no such folder"):
        train(base=tmp_path / "gone")
    with pytest.raises(UsageError, match="holds no config"):
        train(base=tmp_path)
    for name, match in (("model.safetensors", "lack model.safetensors"), ("tokenizer.json", "cannot|can't|not")):
        partial = tmp_path / name
        shutil.copytree(base, partial)
        (partial / name).unlink()
        with pytest.raises(UsageError, match=match):
            train(base=partial)
    (base_of_code := tmp_path / "code").mkdir()
    shutil.copytree(base, base_of_code, dirs_exist_ok=True)
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "evil.Config"}}
    (base_of_code / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (base_of_code / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    with pytest.raises(UsageError, match="not a causal language model"):
        train(base=base_of_code)
    assert not (tmp_path / "ran").exists()


def test_a_base_that_is_neither_cached_nor_reachable_names_the_way_out(train: Train) -> None:
    with pytest.raises(NetworkError, match="org/tiny is not in the local cache") as caught:
        train(base=None)
    assert "--base DIR" in caught.value.hint


def other_weights(base: Path, target: Path, value: float = 0.5) -> Path:
    """A copy of the base with one other number in its weights."""
    from safetensors.torch import save_file

    shutil.copytree(base, target)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = value
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target
