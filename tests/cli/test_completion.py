"""What a shell completes is what there is, and completing it loads nothing heavy."""

import os
import subprocess
import sys

import pytest

from lora_merge.aggregation.methods import METHODS
from lora_merge.checkpoint.planned import DTYPES
from lora_merge.cli.aggregate import DTYPES as COMPLETED_DTYPES
from lora_merge.cli.aggregate import METHODS as COMPLETED_METHODS
from lora_merge.cli.recipes import recipe_names
from lora_merge.cli.watch import FOLDED

COMPLETE = """
import sys
from lora_merge.cli.main import main
try:
    main()
finally:
    print(*sorted({"torch", "transformers", "peft", "huggingface_hub", "datasets", "numpy"} & set(sys.modules)))
"""


def completed(line: str) -> tuple[list[str], str]:
    """What bash would offer for the last word of a command line; and the heavy modules that this loaded."""
    told = {"_LORA_MERGE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    command = [sys.executable, "-c", COMPLETE]
    ran = subprocess.run(command, env=os.environ | told, capture_output=True, text=True, timeout=60, check=True)
    *offered, heavy = ran.stdout.splitlines()
    return [word for word in offered if word], heavy


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("lora-merge train lap", ["laptop"]),
        ("lora-merge init org/x --recipe lap", ["laptop"]),
        ("lora-merge recipes show paper-g", ["paper-gemma-2b"]),
        ("lora-merge aggregate --method f", ["fedavg", "ffa"]),
        ("lora-merge aggregate --dtype b", ["bf16"]),
        ("lora-merge watch --method s", ["svd"]),
        ("lora-merge watch --dtype f", ["fp32", "fp16"]),
    ],
)
def test_a_shell_completes_recipes_methods_and_float_types(line: str, offered: list[str]) -> None:
    assert completed(line) == (offered, "")


def test_what_is_completed_is_what_there_is() -> None:
    assert sorted(COMPLETED_METHODS) == sorted(METHODS)
    assert sorted(COMPLETED_DTYPES) == sorted(DTYPES)
    assert sorted(FOLDED) == sorted(name for name, method in METHODS.items() if method.folds)
    assert "laptop" in recipe_names()
