"""A merge of many clients from the Hub: its time, memory, threads and calls.

`python -m tests.sources.many [COUNT [WIDTH]]`: COUNT clients of 512 x WIDTH bytes each, and a tenth of them.
A mean by `fedavg` says what the clients cost; `exact` also holds two modules of its result, which grow with them.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.hub.server import LocalHub
from tests.sources.federation import publish

CHILD = """
import json, re, sys, threading, time
from lora_merge.cli.main import main
def status(name):
    with open("/proc/self/status") as lines:
        return int(re.search(rf"^{name}:\\s+(\\d+)", lines.read(), re.M)[1])
most = 0
def watch():
    global most
    while True:
        most = max(most, status("Threads"))
        time.sleep(0.05)
threading.Thread(target=watch, daemon=True).start()
sys.argv = ["lora-merge", "aggregate", *sys.argv[1:]]
try:
    main()
finally:
    # Not getrusage, whose peak a process has from its parent.
    print(json.dumps({"peak_kB": status("VmHWM"), "threads": most}), file=sys.stderr)
"""


def measure(count: int, width: int, xet: bool, method: str) -> dict[str, float]:
    """Merge `org/client-*` of `count` clients in a process of its own, with an empty cache."""
    with tempfile.TemporaryDirectory() as folder, LocalHub() as hub:
        publish(hub, count, width=width, layers=32)
        arguments = ["org/client-*", "-o", "global", "-q", "--certificate", "off", "--method", method]
        environment = hub.env(cache=Path(folder, "home"), xet=xet)
        began = time.monotonic()
        ran = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments], env=environment, cwd=folder, capture_output=True, text=True
        )
        seconds = time.monotonic() - began
        assert ran.returncode == 0, ran.stderr
        measured = json.loads(ran.stderr.splitlines()[-1])
        api = len(hub.calls("* /api/*"))
        return {
            "clients": count,
            "seconds": round(seconds, 1),
            "peak_MB": measured["peak_kB"] // 1000,
            "threads": measured["threads"],
            "api_calls": api,
            "api_calls_a_client": round(api / count, 3),
            "calls_a_client": round(len(hub.calls()) / count, 1),
        }


def main() -> None:
    count, width = (int(text) for text in [*sys.argv[1:], "200", "4000"][:2])
    for xet in (True, False):
        for method in ("fedavg", "exact"):
            for clients in (max(count // 10, 1), count):
                print("Xet" if xet else "LFS", method, json.dumps(measure(clients, width, xet, method)), flush=True)


if __name__ == "__main__":
    main()
