"""lora-merge: one exact merge of LoRA adapters that were fine-tuned apart.

Importing the package is light; each public name loads what it needs when it is first used.
"""

TYPE_CHECKING = False  # typing's takes 10 ms, in which a Ctrl-C would end the command line with a traceback
if TYPE_CHECKING:
    from typing import Any

    from lora_merge.folding.onto import Fold as Fold
    from lora_merge.folding.onto import fold as fold
    from lora_merge.pipeline import Aggregation as Aggregation
    from lora_merge.pipeline import aggregate as aggregate

__version__ = "0.1.0"

_PUBLIC = {
    "aggregate": "lora_merge.pipeline",
    "Aggregation": "lora_merge.pipeline",
    "fold": "lora_merge.folding.onto",
    "Fold": "lora_merge.folding.onto",
}
__all__ = ["Aggregation", "Fold", "__version__", "aggregate", "fold"]


def __getattr__(name: str) -> "Any":
    from importlib import import_module

    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lora_merge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
