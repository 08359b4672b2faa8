"""lora-merge: one exact merge of LoRA adapters that were fine-tuned apart.

Importing the package is light; each public name loads what it needs when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lora_merge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
