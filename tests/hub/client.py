"""A long-lived interpreter with huggingface_hub imported.

Importing it takes a second, and it reads HF_ENDPOINT only then: so one client serves many tests.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

CHILD = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import huggingface_hub
from huggingface_hub import HfApi
space = {"hf": huggingface_hub, "api": HfApi()}
for line in sys.stdin:
    code, given = json.loads(line)
    names = {**space, **given, "result": None}
    try:
        exec(code, names)
        text = json.dumps({"result": names["result"]}, default=str)
    except BaseException as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        text = json.dumps({"error": kinds, "text": str(error)})
    print(text, file=answers, flush=True)
os._exit(0)  # taking all that it imported apart would take a second
"""


# What a developer's own environment says about the Hub, or about the way to it, is not for the tests.
FOREIGN = ("HF_", "HUGGING", "TRANSFORMERS_", "XET_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


def environment(url: str, cache: Path, *, token: str | None, xet: bool) -> dict[str, str]:
    """The environment in which a new process finds the Hub at `url`, and keeps in `cache` what it keeps."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(FOREIGN)}
    return {
        **kept,
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_XET_XORB_COMPRESSION_POLICY": "none",
        **({"HF_TOKEN": token} if token else {}),
        **({} if xet else {"HF_HUB_DISABLE_XET": "1"}),
    }


class ClientError(Exception):
    """What was raised in the client: the names of the exception's class and its bases, and its text."""

    def __init__(self, kinds: list[str], text: str) -> None:
        super().__init__(f"{kinds[0]}: {text}")
        self.kinds, self.text = kinds, text


class Client:
    """Runs code in the interpreter, where `hf` is huggingface_hub and `api` an HfApi, and gives back `result`."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD], env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.orders, self.answers = self.process.stdin, self.process.stdout

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, code: str, **given: Any) -> Any:
        """The value of `result` after `code`, in which the names of `given` are set.

        Raises:
            ClientError: what the code raised.
        """
        self.orders.write(json.dumps([code, given], default=str) + "\n")
        self.orders.flush()
        told = json.loads(self.answers.readline() or '{"error": ["Exit"], "text": "the client has ended"}')
        if "error" in told:
            raise ClientError(told["error"], told["text"])
        return told["result"]

    def close(self) -> None:
        """Ends the interpreter."""
        self.orders.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.answers.close()
