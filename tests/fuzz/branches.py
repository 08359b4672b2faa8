"""Which refusals the mutants met: every place in the source where one is made, and how often it was reached."""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_merge import ledger, ledger_form, lock, statement
from lora_merge.checkpoint import config, core_file, layout, safetensors_file

MODULES = (safetensors_file, config, core_file, layout, statement, ledger, ledger_form, lock)
REFUSALS = (safetensors_file.FileRefused, statement.StatementError, ledger_form.LedgerError, lock.LockError)
Branch = tuple[str, int]


def branches() -> dict[Branch, str]:
    """Every call in the readers that makes a refusal, by file and line; and every field that `take` checks."""
    found: dict[Branch, str] = {}
    names = {kind.__name__ for kind in REFUSALS} | {"take"}
    for module in MODULES:
        path = Path(module.__file__ or "")
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in names:
                found[path.name, node.lineno] = " ".join(ast.unparse(node).split())[:110]
    return found


@contextmanager
def recorded() -> Iterator[Counter[Branch]]:
    """Count where refusals are made; a field that `take` refuses counts for the line that names the field."""
    met: Counter[Branch] = Counter()
    before = [kind.__init__ for kind in REFUSALS]

    def counting(init: Any) -> Any:
        def counted(self: Any, *args: Any) -> None:
            frame: Any = sys._getframe(1)
            met[Path(frame.f_code.co_filename).name, frame.f_lineno] += 1
            if frame.f_code.co_name == "take":
                met[Path(frame.f_back.f_code.co_filename).name, frame.f_back.f_lineno] += 1
            init(self, *args)

        return counted

    for kind, init in zip(REFUSALS, before, strict=True):
        kind.__init__ = counting(init)  # type: ignore[method-assign]
    try:
        yield met
    finally:
        for kind, init in zip(REFUSALS, before, strict=True):
            kind.__init__ = init  # type: ignore[method-assign]
