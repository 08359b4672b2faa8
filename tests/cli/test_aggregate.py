"""`lora-merge aggregate` as a user sees it: exit codes, what goes to stdout, `--json`, and what it leaves behind."""

import fcntl
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_merge.cli.aggregate import ranks_shown
from lora_merge.cli.main import main
from lora_merge.ledger import Certificate
from lora_merge.statement import Statement

Run: TypeAlias = Callable[..., tuple[int, str, str]]

CONSOLE_SCRIPT = (sys.executable, "-c", "from lora_merge.cli.main import main; main()")
LORA_A = "base_model.model.layer.lora_A.weight"


def client(folder: Path, *, num_examples: int | None = 10, r: int = 2, width: int = 8, seed: int = 0) -> Path:
    """An adapter of one width x width module."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    A, B = torch.randn(r, width, generator=random), torch.randn(width, r, generator=random)
    save_file({LORA_A: A, LORA_A.replace("_A", "_B"): B}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": ["layer"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if num_examples is not None:
        statement = Statement(client_id=f"org/{folder.name}", num_examples=num_examples)
        (folder / "lora_merge.json").write_text(statement.to_json())
    return folder


def poison(folder: Path, value: float) -> Path:
    """Put `value` into one entry of lora_A."""
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[LORA_A][0, 0] = value
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("a", "b", "--json")`: exit code, stdout and stderr of `lora-merge aggregate …` in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora-merge", "aggregate", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two clients, `a` with 10 examples and `b` with 30."""
    return client(tmp_path / "a", seed=1), client(tmp_path / "b", num_examples=30, seed=2)


@pytest.mark.usefixtures("two")
def test_the_result_is_on_stdout_and_the_talk_on_stderr(run: Run, tmp_path: Path) -> None:
    code, out, err = run("a", "b", "--output", "global")
    assert code == 0
    shown = dict(line.split("  ", 1) for line in out.splitlines())
    assert shown["clients"].strip() == "org/a (25.0%), org/b (75.0%)"
    assert shown["method"].strip() == "exact, weights by examples"
    assert shown["rank"].strip() == "4"
    assert shown["certificate"].strip().startswith("relative error ")
    assert shown["fedavg would miss"].strip().endswith("(an estimate)")
    assert err == "warning: org/a, org/b do not state the hash of their base model's weights; taken on trust.\n"
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "aggregation.json", "lora-merge.lock"]
    assert sorted(path.name for path in (tmp_path / "global").iterdir()) == files


@pytest.mark.usefixtures("two")
def test_quiet_prints_just_the_path(run: Run) -> None:
    code, out, _ = run("a", "b", "-o", "global", "-q")
    assert (code, out) == (0, "global\n")


@pytest.mark.usefixtures("two")
def test_json_is_one_object_that_says_what_aggregation_json_says(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("a", "b", "-o", "global", "--json")
    record = json.loads(out)
    assert code == 0
    assert (record["schema_version"], record["output"], record["method"]) == (1, "global", "exact")
    assert [entry["client_id"] for entry in record["contributions"]] == ["org/a", "org/b"]
    assert record["certificate"]["whole"]["relative_error"] < 1e-6
    assert record["seconds"] > 0
    assert len(record["warnings"]) == 1
    stored = json.loads((tmp_path / "global" / "aggregation.json").read_text())
    assert {key: record[key] for key in stored} == stored


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nope"], "--nope"),
        (["--method", "mean"], "is 'mean'"),
        (["--method", "svd", "--rank", "0"], "--rank must be a number from 1 up, auto or lossless"),
        (["--method", "svd", "--rank", "many"], "is 'many'"),
        (["--method", "svd", "--rank", "9" * 5000], "--rank must be a number"),
        (["--rank", "4"], "--rank is of --method svd"),
        (["--energy", "0.9"], "--energy is of --method svd"),
        (["--method", "svd", "--rank", "4", "--energy", "0.9"], "for --rank auto only"),
        (["--method", "svd", "--energy", "1.5"], "--energy is a share above 0 and up to 1"),
        (["--energy", "high"], "--energy"),
        (["--global-lr", "0"], "--global-lr must be a number from 1e-30 to 1e+30"),
        (["--global-lr", "nan"], "--global-lr must be a number from 1e-30 to 1e+30"),
        (["--global-lr", "1e39"], "--global-lr must be a number from 1e-30 to 1e+30"),
        (["--cap-examples", "1e-320"], "--cap-examples must be a number from 1e-30 to 1e+30"),
        (["--clip", "1e308x"], "with a number from 1e-30 to 1e+30"),
        (["--dtype", "int8"], "--dtype must be one of fp32, bf16, fp16"),
        (["--method", "exat"], "is 'exat' (did you mean exact?)"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:INDEX"),
        (["--device", "meta"], "--device must be auto, cpu, cuda or cuda:INDEX"),
        (["--device", "cuda:99"], "There is no CUDA device cuda:99"),
        (["--certificate", "maybe"], "--certificate must be exact, probes or off"),
        (["--workers", "0"], "--workers"),
        (["--weight", "a"], "--weight must be SOURCE=NUMBER, is 'a'"),
        (["--weight", "a=much", "--weight", "b=1"], "--weight must be SOURCE=NUMBER, is 'a=much'"),
        (["--weight", "a=1"], "No weight is given for org/b"),
        (["--weight", "a=1", "--weight", "b=-1"], "must be 0, or from 1e-30"),
        (["--weight", "a=1", "--weight", "b=nan"], "must be 0, or from 1e-30"),
        (["--weight", "a=0", "--weight", "b=0"], "sum to zero"),
        (["--weight", "a=1", "--weight", "c=1"], "'c', which is not among the clients: org/a, org/b"),
        (["--weight", "a=1", "--weight", "org/a=1", "--weight", "b=1"], "org/a is given two weights"),
        (["--weights", "uniform", "--weight", "a=1"], "exclude each other"),
        (["--weight", "a=1", "--weight", "b=1", "--weight", "a=2"], "gives a two weights"),
    ],
)
def test_a_wrong_option_is_exit_2_and_writes_nothing(run: Run, tmp_path: Path, arguments: list[str], said: str) -> None:
    code, out, err = run("a", "b", "-o", "global", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    code, out, err = run("a", "b", "-o", "global", *arguments, "--json")
    record = json.loads(out)
    assert (code, err, set(record)) == (2, "", {"schema_version", "error"})
    assert record["error"]["code"] == 2
    assert said in record["error"]["message"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("w.json", '{"a": 1, "b"', "cannot be read as weights"),
        ("w.yaml", "a: [1\nb: 2", "cannot be read as weights"),
        ("w.yaml", "", "must be a mapping"),
        ("w.json", "[1, 2]", "is not a JSON object"),
        ("w.json", '{"a": 1, "a": 5, "b": 1}', "names an entry twice"),
        ("w.yaml", "a: 1\na: 5\nb: 1", "a comes twice"),
        ("w.yaml", "a: heavy\nb: 1", "must be a number"),
        ("w.yaml", "a: true\nb: 1", "must be a number"),
        ("w.yaml", "a: .inf\nb: 1", "must be 0, or from 1e-30"),
    ],
)
@pytest.mark.usefixtures("two")
def test_a_bad_weights_file_is_exit_2_in_one_line(run: Run, tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    code, out, err = run("a", "b", "-o", "global", "--weights", name)
    assert (code, out) == (2, "")
    assert said in err.splitlines()[0]
    assert len([line for line in err.splitlines() if not line.startswith("hint: ")]) == 1


@pytest.mark.usefixtures("two")
def test_weights_come_from_a_file_by_client_or_source_and_single_ones_win(run: Run, tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text("org/a: 1\nb: 1\n")
    code, out, _ = run("a", "b", "-o", "global", "--weights", "w.yaml", "--weight", "b=4", "--json")
    assert code == 0
    assert [entry["share"] for entry in json.loads(out)["contributions"]] == [0.2, 0.8]


def test_clients_that_state_no_examples_need_weights(run: Run, tmp_path: Path) -> None:
    client(tmp_path / "a", num_examples=None)
    client(tmp_path / "b", num_examples=None, seed=1)
    code, out, err = run("a", "b", "-o", "global")
    assert (code, out) == (2, "")
    assert "a, b do not state num_examples, so they have no weight" in err
    assert "hint: Say --weights uniform, or give each one with --weight SOURCE=NUMBER." in err
    assert run("a", "b", "-o", "global", "--weights", "uniform")[0] == 0


@pytest.mark.usefixtures("two")
def test_an_existing_output_is_replaced_only_by_force(run: Run, tmp_path: Path) -> None:
    (tmp_path / "global").mkdir()
    assert run("a", "-o", "global")[0] == 0  # an empty folder is nobody's work
    before = (tmp_path / "global" / "aggregation.json").read_bytes()
    code, out, err = run("b", "-o", "global")
    assert (code, out) == (2, "")
    assert "global exists already." in err
    assert "--force" in err
    assert (tmp_path / "global" / "aggregation.json").read_bytes() == before
    assert run("b", "-o", "global", "--force")[0] == 0
    assert (tmp_path / "global" / "aggregation.json").read_bytes() != before


def test_every_bad_client_is_named_at_once_and_nothing_is_written(run: Run, two: tuple[Path, Path]) -> None:
    poison(two[0], float("nan"))
    poison(two[1], float("inf"))
    code, out, err = run("a", "b", "-o", "global")
    assert (code, out) == (3, "")
    assert err.splitlines() == [
        "error: 2 problems in 2 inputs:",
        f"  org/a: {LORA_A}: holds NaN or infinity",
        f"  org/b: {LORA_A}: holds NaN or infinity",
    ]
    code, out, err = run("a", "b", "-o", "global", "--json")
    problems = json.loads(out)["error"]["problems"]
    assert (code, err) == (3, "")
    assert problems == [
        {"client": name, "field": LORA_A, "reason": "holds NaN or infinity"} for name in ("org/a", "org/b")
    ]
    assert not (two[0].parent / "global").exists()


@pytest.mark.parametrize(
    ("method", "lines"),
    [
        ("ffa", ["  all clients: layer: lora_A of org/a and org/b differ"]),
        ("fedavg", ["  all clients: layer: the clients have"]),
    ],
)
def test_a_method_that_cannot_merge_names_the_modules_and_the_methods_that_can(
    method: str, lines: list[str], run: Run, tmp_path: Path
) -> None:
    for name, r in (("a", 2), ("b", 2 if method == "ffa" else 3)):
        client(tmp_path / name, r=r, seed=r + (name == "b"))
    code, _, err = run("a", "b", "-o", "global", "--method", method)
    assert code == 3
    assert err.startswith("error: 1 problem of all clients together:\n")
    assert all(line in err for line in lines)
    assert "hint: --method exact or svd" in err


def test_where_shapes_do_not_fit_it_is_said_first_that_the_bases_have_other_names(run: Run, tmp_path: Path) -> None:
    for name, base, width in (("a", "org/base", 8), ("b", "/models/llama", 12), ("c", "org/base", 8)):
        path = client(tmp_path / name, width=width) / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    said = [
        "  org/b: base_model_name_or_path: is /models/llama, where {} have org/base: it may be another model",
        "  org/b: layer: is linear 12x12, where {} have linear 8x8",
    ]
    code, _, err = run("a", "b", "-o", "global")
    assert code == 3
    assert err.splitlines()[:3] == ["error: 2 problems in 1 input:", *(line.format("1 of 2 clients") for line in said)]
    assert run("a", "c", "--onto", "global")[0] == 0
    for more in ((), ("--dry-run",)):
        code, _, err = run("b", "--onto", "global", *more)
        assert code == 3
        assert said[0].format("2 of 3 clients") in err.splitlines()


def test_a_refused_config_is_exit_3_and_names_client_field_and_reason(run: Run, two: tuple[Path, Path]) -> None:
    (two[1] / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "use_qalora": true, "lora_alpha": "8"}')
    code, out, err = run("a", "b", "-o", "global")
    assert (code, out) == (3, "")
    assert "  b: lora_alpha: must be a finite number above 0, is '8'" in err
    assert "  b: use_qalora: QALoRA pools its input" in err


def test_a_folder_of_adapters_and_a_mistyped_folder_are_told_apart_from_the_hub(run: Run, tmp_path: Path) -> None:
    client(tmp_path / "clients" / "a")
    code, _, err = run("clients", "-o", "global")
    assert code == 4
    assert "'clients/*'" in err
    code, _, err = run("clientz/*", "-o", "global")
    assert code == 5
    assert "There is no folder clientz/* here, and the Hub cannot be asked: " in err
    assert run("clients/*", "-o", "global", "--weight", "a=2")[0] == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.usefixtures("two")
def test_the_memory_that_a_dry_run_says_is_of_the_whole_process(run: Run) -> None:
    said = json.loads(run("a", "b", "--dry-run", "--json")[1])["memory"]
    script = "import lora_merge; lora_merge.aggregate(['a', 'b'], 'global'); print(open('/proc/self/status').read())"
    merged = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", merged.stdout)
    assert 0.25 < said / (int(peak) * 1024) < 4


@pytest.mark.usefixtures("two")
def test_weights_that_were_given_are_said_to_be(run: Run) -> None:
    out = run("a", "b", "-o", "global", "--weight", "a=1", "--weight", "b=1")[1]
    assert "exact, weights as given" in out


@pytest.mark.usefixtures("two")
def test_no_match_is_exit_4_with_a_near_miss(run: Run, tmp_path: Path) -> None:
    client(tmp_path / "hospital-1")
    code, out, err = run("hopsital-*", "a", "-o", "global")
    assert (code, out) == (4, "")
    assert "error: No folder matches hopsital-*." in err
    assert "hint: Did you mean hospital-1?" in err
    assert run("a/adapter_config.json", "-o", "global")[0] == 4


@pytest.mark.usefixtures("two")
def test_a_missing_weights_file_is_exit_4_and_says_what_weights_takes(run: Run) -> None:
    code, out, err = run("a", "b", "-o", "global", "--weights", "exampels")
    assert (code, out) == (4, "")
    assert "No such weights file: exampels." in err
    assert "--weights takes examples, uniform, or the path" in err


@pytest.mark.usefixtures("two")
def test_an_output_below_a_file_is_exit_7(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, out, err = run("a", "b", "-o", "file/global")
    assert (code, out) == (7, "")
    assert "error: cannot write file/global: " in err
    assert (tmp_path / "file").read_text() == "mine"
    assert json.loads(run("a", "b", "-o", "file/global", "--json")[1])["error"]["code"] == 7


@pytest.mark.parametrize("room", [1, 1 << 16, (1 << 18) - 4096])
def test_a_place_without_room_is_exit_7_and_leaves_the_old_output(run: Run, tmp_path: Path, room: int) -> None:
    for name in ("a", "b"):
        client(tmp_path / name, r=16, width=2048)  # 128 KiB a factor
    assert run("a", "-o", "global")[0] == 0
    before = (tmp_path / "global" / "adapter_model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        code, out, err = run("a", "b", "-o", "global", "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, out) == (7, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    assert (tmp_path / "global" / "adapter_model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "global"]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_exit_7_and_leaves_nothing(run: Run, full_disk: Path, tmp_path: Path) -> None:
    client(tmp_path / "a", r=16, width=4096)
    code, out, err = run("a", "-o", str(full_disk / "global"))
    assert (code, out) == (7, "")
    assert "No space left on device" in err.splitlines()[-1]
    assert list(full_disk.iterdir()) == []


def test_ctrl_c_is_exit_130_and_leaves_nothing(tmp_path: Path) -> None:
    client(tmp_path / "a", r=512, width=1024)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    many = {name.replace("layer", f"layer.{i}"): tensor.clone() for name, tensor in tensors.items() for i in range(8)}
    save_file(many, tmp_path / "a" / "adapter_model.safetensors")
    arguments = ["aggregate", "a", "-o", "global", "--method", "svd", "--rank", "16", "--workers", "1"]
    merging = subprocess.Popen(
        [*CONSOLE_SCRIPT, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob(".global.partial-*/*.safetensors")) and merging.poll() is None:
        time.sleep(0.01)
    merging.send_signal(signal.SIGINT)
    out, err = merging.communicate()
    assert (merging.returncode, out) == (130, "")
    assert err.splitlines() == [
        "error: Interrupted; nothing half-written was left.",
        "hint: Run the same command again: what is whole is not downloaded again.",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.usefixtures("two")
def test_the_wait_for_another_programs_lock_is_said_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    theirs = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(theirs, fcntl.LOCK_EX)
    command = [*CONSOLE_SCRIPT, "aggregate", "a", "b", "-o", "global"]
    try:
        with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as waiting:
            assert waiting.stderr is not None
            assert waiting.stderr.readline() == f"Waiting for another program that has {tmp_path} locked.\n"
            waiting.send_signal(signal.SIGINT)
            assert waiting.wait(timeout=10) == 130
    finally:
        os.close(theirs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.usefixtures("two")
def test_the_installed_command_is_plain_text_of_whole_lines_in_a_pipe(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("lora-merge")
    command = [str(script)] if script.exists() else list(CONSOLE_SCRIPT)
    narrow = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    output = "a-long-name-" * 12
    ran = subprocess.run(
        [*command, "aggregate", "a", "b", "-o", output], cwd=tmp_path, env=narrow, capture_output=True, text=True
    )
    assert ran.returncode == 0
    lines = ran.stdout.splitlines()
    assert lines[0].startswith(f"global adapter     {output}  (")
    assert [line[:19].strip() for line in lines] == [
        *("global adapter", "clients", "method", "rank", "certificate", "fedavg would miss"),
    ]
    assert "\x1b" not in ran.stdout + ran.stderr


def test_a_clients_folder_name_cannot_drive_the_terminal_or_forge_a_line(run: Run, tmp_path: Path) -> None:
    names = ["a\x1b]0;owned\x07\x1b[31m", "b\nerror: forged", "[", "c\u202e\x9b"]
    for seed, name in enumerate(names):
        client(tmp_path / "in" / name / "x]", num_examples=None, seed=seed)
    for arguments, expected in (([], 2), (["--weights", "uniform"], 0), (["--weights", "uniform", "-q", "--force"], 0)):
        code, out, err = run("in/*/*", "-o", "global", *arguments)
        assert code == expected
        assert all(char == "\n" or char.isprintable() for char in out + err)
        assert all(line.startswith(("error: ", "hint: ", "warning: ")) for line in err.splitlines())
        assert "error: forged" not in (out + err).splitlines()
        assert "[/x]" in out + err
    for folder in (tmp_path / "in").iterdir():
        poison(folder / "x]", float("nan"))
    code, out, err = run("in/*/*", "-o", "global", "--weights", "uniform", "--force")
    assert (code, out, len(err.splitlines())) == (3, "", 1 + len(names))
    assert all(char == "\n" or char.isprintable() for char in err)
    code, out, err = run("in/*/*", "-o", "global", "--weights", "uniform", "--force", "--json")
    assert (code, err, len(json.loads(out)["error"]["problems"])) == (3, "", len(names))
    assert "\x1b" not in out


@pytest.mark.usefixtures("two")
def test_the_environment_sets_defaults_and_an_option_goes_above_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_MERGE_AGGREGATE_METHOD", "fedavg")
    monkeypatch.setenv("LORA_MERGE_AGGREGATE_OUTPUT", "global")
    record: dict[str, Any] = json.loads(run("a", "b", "--json")[1])
    assert (record["method"], record["output"]) == ("fedavg", "global")
    record = json.loads(run("a", "b", "--json", "--method", "exact", "--force")[1])
    assert record["method"] == "exact"
    monkeypatch.setenv("LORA_MERGE_AGGREGATE_METHOD", "mean")
    assert run("a", "b", "--force")[0] == 2


@pytest.mark.parametrize(
    "arguments", [["--json"], ["a", "--json"], ["a", "-o", "global", "--json", "--workers", "many"]]
)
def test_a_command_line_that_cannot_be_parsed_is_exit_2_and_json_where_json_was_asked_for(
    run: Run, arguments: list[str]
) -> None:
    code, out, err = run(*arguments)
    assert (code, err) == (2, "")
    assert set(json.loads(out)["error"]) == {"code", "message", "hint"}
    code, out, err = run(*(argument for argument in arguments if argument != "--json"))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.endswith("hint: lora-merge aggregate --help\n")


def test_help_is_exit_0_and_names_every_method(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert all(method in out for method in ("exact", "svd", "fedavg", "ffa"))


def test_help_says_that_onto_makes_a_global_adapter_where_there_is_none(run: Run) -> None:
    assert "made where there is none" in " ".join(run("--help")[1].replace("│", " ").split())


def test_a_rank_above_that_of_the_merge_is_said_to_be(run: Run, two: tuple[Path, Path]) -> None:
    code, _, err = run("a", "b", "-o", "global", "--method", "svd", "--rank", "100000")
    assert code == 0
    assert "--rank 100000 is more than the merge of these clients can have; the rank is 4." in err
    assert "--rank" not in run("a", "b", "-o", "other", "--method", "svd", "--rank", "4")[2]


@pytest.mark.parametrize(
    ("ranks", "shown"),
    [([], "none"), ([8], "8"), ([4, 8, 9, 16], "4, 8, 9, 16"), ([*range(8, 17)], "8 to 16, by module")],
)
def test_a_few_ranks_are_listed_and_many_are_a_range(ranks: list[int], shown: str) -> None:
    assert ranks_shown(ranks) == shown


@pytest.mark.parametrize(
    ("error", "spread", "said"),
    [
        (0.0357, 3.4e-4, "3.57% ± 0.03%"),
        (0.0357, 1e-6, "3.5700% ± 0.0001%"),
        (0.5, 0.03, "50.00% ± 3.00%"),
        (5e-4, 3e-5, "5.0e-04 ± 3.0e-05"),
        (0.2, float("nan"), "20.00%"),
        (0.2, 0.0, "20.00% ± 0.00%"),
        (0.2, None, "20.00%"),
        (0.0, 0.0, "0"),
    ],
)
def test_an_error_and_its_uncertainty_have_one_unit(error: float, spread: float | None, said: str) -> None:
    whole = {"relative_error": error} | ({} if spread is None else {"standard_error": spread})
    estimate = " (an estimate)" if error and spread is not None else ""
    assert Certificate("probes", whole).sentence() == f"relative error {said}{estimate}"
    assert Certificate("off", fedavg_would_miss=whole).gap_sentence() == f"relative error {said}{estimate}"


def test_onto_a_global_adapter_the_defaults_are_what_it_was_made_with(run: Run, two: tuple[Path, Path]) -> None:
    given = ("--method", "svd", "--rank", "1", "--dtype", "bf16", "--weights", "uniform")
    assert run("a", "--onto", "global", *given)[0] == 0
    code, out, _ = run("a", "b", "--onto", "global", "--json")
    made = json.loads(out)
    assert (code, made["method"], made["options"]["rank"]) == (0, "svd", 1)
    assert (made["dtype"], made["weighting"]) == ("bf16", "uniform")


@pytest.mark.usefixtures("two")
def test_what_is_out_of_the_ordinary_is_shown(run: Run) -> None:
    assert "global learning rate 0.5" in run("a", "b", "-o", "global", "--global-lr", "0.5")[1]
    assert "global learning rate" not in run("a", "b", "-o", "other")[1]
    assert run("a", "--onto", "founded")[1].startswith("new global adapter")
    assert run("b", "--onto", "founded")[1].startswith("global adapter")
