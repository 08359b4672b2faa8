"""Downloads: every byte is hashed, whole files stay, partial ones go; waits are shown and end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import digests
from tests.hub.server import LocalHub
from tests.sources.conftest import fresh
from tests.sources.federation import Puller, adapter, publish

WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("name", sorted(adapter("org/client-0")))
def test_a_flipped_bit_is_fetched_again_once_and_then_refused(hub: LocalHub, pull: Puller, name: str) -> None:
    publish(hub, 1)
    assert pull("org/client-0", "-o", "clean").code == 0
    whole = digests(pull.folder / "clean")
    pull.forget()
    # Small files come from the Hub itself; the weights from the CDN, or in Xet's chunks (behind their 8-byte headers).
    on = ["GET /lfs/*", "GET /xorbs/*"] if name == WEIGHTS else [f"GET */{name}"]
    faults = [hub.fault(pattern, "flip", times=1) for pattern in on]
    ran = pull("org/client-0", "-o", "global")
    assert (ran.code, digests(pull.folder / "global")) == (0, whole), ran.err
    assert any(fault.hits for fault in faults)
    pull.forget()
    for pattern in on:
        hub.fault(pattern, "flip", times=None)
    ran = pull("org/client-0", "-o", "again")
    assert ran.code == 3, ran.err
    assert not list(pull.home.glob(f"hub/models--*/snapshots/*/{name}")), "it stayed in the cache"
    assert not (pull.folder / "again").exists()


@pytest.mark.parametrize("name", sorted(adapter("org/client-0")))
@pytest.mark.parametrize("where", [0, 41, -1])
def test_a_file_that_was_corrupted_in_the_cache_is_fetched_again(
    hub: LocalHub, pull: Puller, name: str, where: int
) -> None:
    publish(hub, 1)
    assert pull("org/client-0", "-o", "clean").code == 0
    cached = next(pull.home.glob(f"hub/models--org--client-0/snapshots/*/{name}")).resolve()
    content = bytearray(cached.read_bytes())
    content[where] ^= 1
    cached.write_bytes(content)
    ran = pull("org/client-0", "-o", "global")
    assert ran.code == 0
    assert digests(pull.folder / "global") == digests(pull.folder / "clean")


def test_a_file_that_was_planted_in_the_cache_is_refused(hub: LocalHub, pull_once: Puller) -> None:
    files = adapter("org/client-0")
    statement = files.pop("lora_merge.json")
    hub.create("org/client-0", files)
    assert pull_once("org/client-0", "-o", "global", "--weights", "uniform").code == 0
    folder = next(pull_once.home.glob("hub/models--org--client-0/snapshots/*"))
    (folder / "lora_merge.json").write_bytes(statement)
    ran = pull_once("org/client-0", "-o", "again", "--weights", "uniform")
    assert ran.code == 3
    assert "lies in the cache" in ran.err


def test_waits_are_shown_and_end_at_max_wait(hub: LocalHub, pull_once: Puller) -> None:
    publish(hub, 2)
    hub.fault("GET /api/models", "status", status=429, retry_after=1, times=1)
    began = time.monotonic()
    ran = pull_once("org/client-*", "-o", "global")
    assert ran.code == 0
    assert time.monotonic() - began > 1
    assert "127.0.0.1 answers 429; trying again in 1 s.\n" in ran.err
    hub.fault("GET /api/models", "status", status=429, retry_after=3600, times=None)
    began = time.monotonic()
    ran = pull_once("org/client-*", "-o", "again", "--max-wait", "60")
    assert time.monotonic() - began < 5
    assert (ran.code, ran.err.splitlines()) == (
        5,
        [
            "error: There is no folder org/client-* here, and the Hub cannot be asked: "
            "127.0.0.1 answers 429 and asks to wait 3600 s; gave up after 0 s.",
            "hint: Try again later, or raise --max-wait.",
        ],
    )


def test_the_waits_of_all_calls_together_end_at_max_wait(hub: LocalHub, pull_once: Puller) -> None:
    publish(hub, 1)
    for request in ("GET /api/models/org/client-0/revision/*", "GET */adapter_config.json", "GET */lora_merge.json"):
        hub.fault(request, "status", status=429, retry_after=1)
    ran = pull_once("org/client-*@main", "-o", "global", "--max-wait", "2.5")
    assert ran.code == 5
    assert ran.err.splitlines()[-2] == "error: 127.0.0.1 answers 429 and asks to wait 1 s; gave up after 2 s."


@pytest.mark.parametrize(
    ("request_", "source"),
    [
        ("GET /api/models", "org/client-*"),
        ("GET /api/models/*/revision/*", "org/client-0@main"),
        ("GET */adapter_config.json", "org/client-*"),
        ("GET /lfs/*", "org/client-0"),
    ],
)
def test_a_hub_that_stalls_is_waited_for_no_longer_than_was_said(
    hub: LocalHub, pull_once: Puller, request_: str, source: str
) -> None:
    publish(hub, 2)
    hub.fault(request_, "stall", times=None)
    began = time.monotonic()
    ran = pull_once(source, "-o", "global", "--max-wait", "1.2", timeout=30)
    assert time.monotonic() - began < 10  # one try is 30 s
    assert ran.code == 5
    assert "127.0.0.1 does not answer; gave up after 1 s." in ran.err
    assert "raise --max-wait" in ran.err


@pytest.mark.parametrize("request_", ["GET /api/models", "GET /lfs/*"])
def test_a_hub_that_stops_in_the_middle_of_an_answer_too(hub: LocalHub, pull_once: Puller, request_: str) -> None:
    publish(hub, 1, width=20_000)
    hub.fault(request_, "drip", times=None, seconds=60)
    began = time.monotonic()
    ran = pull_once("org/client-*", "-o", "global", "--max-wait", "1.2", timeout=30)
    assert time.monotonic() - began < 10  # one try is 30 s
    assert ran.code == 5
    assert "gave up after 1 s." in ran.err


def test_a_stall_that_passes_is_waited_out_though_little_may_be_waited(hub: LocalHub, pull_once: Puller) -> None:
    publish(hub, 1)
    hub.fault("GET /api/models", "delay", seconds=0.3)
    assert pull_once("org/client-*", "-o", "global", "--max-wait", "0").code == 0
    hub.fault("GET /api/models", "stall")
    assert pull_once("org/client-*", "-o", "again", "--max-wait", "4", timeout=1).code == 0


@pytest.mark.parametrize("kind", ["html", "short"])
def test_a_page_that_is_no_answer_is_asked_for_again_and_not_for_ever(
    hub: LocalHub, pull_once: Puller, kind: Any
) -> None:
    publish(hub, 1)
    fault = hub.fault("GET /api/models", kind, times=2)
    assert pull_once("org/client-*", "-o", "global").code == 0
    assert fault.hits == 2
    hub.fault("GET /api/models", kind, times=None)
    hub.clear_calls()
    assert pull_once("org/client-*", "-o", "again").code == 5
    assert len(hub.calls("GET /api/models")) == 5


def test_a_file_that_comes_byte_by_byte_is_given_up_at_its_deadline(hub: LocalHub, pull: Puller) -> None:
    publish(hub, 1)
    for pattern in ("GET /lfs/*", "GET /xorbs/*"):
        hub.fault(pattern, "drip", times=None, seconds=0.2)
    began = time.monotonic()
    ran = pull("org/client-0", "-o", "global", timeout=1)
    assert (ran.code, ran.out) == (5, "")
    assert time.monotonic() - began < 20  # of a real run, a sixtieth
    assert not (pull.folder / "global").exists()


def test_a_hub_that_cannot_be_reached_is_exit_5(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "lora_merge", "aggregate", "org/client-*", "-o", "global", "--max-wait", "0"]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (5, "")
    assert ran.stderr.startswith(
        "error: There is no folder org/client-* here, and the Hub cannot be asked: 127.0.0.1 cannot be reached"
    )


def start(hub: LocalHub, pull: Puller, xet: bool, *arguments: str) -> subprocess.Popen[str]:
    """`lora-merge aggregate ARGUMENTS` in a process of its own, with the cache and the folder of `pull`."""
    command = [sys.executable, "-m", "lora_merge", "aggregate", *arguments]
    environment, pipe = hub.env(cache=pull.home, xet=xet), subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=pull.folder, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on_with_what_is_whole(
    hub: LocalHub, pullers: dict[bool, Puller], tmp_path: Path, xet: bool, how: signal.Signals
) -> None:
    publish(hub, 3, width=20_000)
    pull = fresh(pullers[xet], tmp_path)
    assert pull("org/client-0", "-o", "global").code == 0
    hub.clear_calls()
    hub.fault("HEAD *.safetensors", "delay", seconds=1, times=None)  # by then the headers were read
    pulling = start(hub, pull, xet, "org/client-*", "-o", "global", "--force")
    partial = "hub/models--org--client-[12]/blobs/*.incomplete"
    while len(hub.calls("GET /lfs/*")) < 2 and pulling.poll() is None:
        time.sleep(0.01)
    hub.fault("GET /v1/reconstructions/*" if xet else "GET /lfs/*", "stall" if xet else "drip", times=None)
    while not list(pull.home.glob(partial)) and pulling.poll() is None:
        time.sleep(0.01)
    pulling.send_signal(how)
    out, err = pulling.communicate(timeout=30)
    assert (pulling.returncode, out) == (130 if how == signal.SIGINT else -9, ""), err
    if how == signal.SIGINT:
        assert err.splitlines() == [
            "error: Interrupted; nothing half-written was left.",
            "hint: Run the same command again: what is whole is not downloaded again.",
        ]
    assert bool(list(pull.home.glob(partial))) == (how == signal.SIGKILL)
    hub.clear_faults()
    hub.clear_calls()
    again = pull("org/client-*", "-o", "global", "--force")
    assert (again.err.count("error"), again.code) == (0, 0)
    assert not hub.calls("* /org/client-0/resolve/*"), "what was whole was downloaded again"
    assert not list(pull.home.glob(partial))
    assert not list(tmp_path.glob(".global*"))


def test_ctrl_c_ends_a_read_from_a_hub_that_stalls(hub: LocalHub, pullers: dict[bool, Puller], tmp_path: Path) -> None:
    publish(hub, 2)
    hub.fault("GET /lfs/*", "stall", times=None)
    pulling = start(hub, fresh(pullers[False], tmp_path), False, "org/client-*", "-o", "global")
    while not hub.calls("GET /lfs/*") and pulling.poll() is None:
        time.sleep(0.01)
    time.sleep(0.2)  # by then it waits for the answer, which it would do for half a minute
    began = time.monotonic()
    pulling.send_signal(signal.SIGINT)
    _, err = pulling.communicate(timeout=60)
    assert pulling.returncode == 130
    assert err.startswith("error: Interrupted")
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("asked", [0, "\u00b2"])
def test_who_asks_to_wait_for_nothing_is_not_asked_again_without_end(
    hub: LocalHub, pull_once: Puller, asked: int
) -> None:
    publish(hub, 1)
    hub.fault("GET /api/models/*", "status", status=429, retry_after=asked, times=None)
    ran = pull_once("org/client-0", "-o", "global")
    assert (ran.code, "429" in ran.err) == (5, True)
    assert len(hub.calls("GET /api/models/*")) <= 6
