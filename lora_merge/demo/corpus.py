"""The demo's rows: functions of the standard library, and the first sentence of each one's docstring.

Sources are parsed, never imported. The same Python gives the same rows on every machine.
"""

import ast
import hashlib
import json
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_merge.checkpoint.folder import atomic_folder
from lora_merge.demo.areas import Area
from lora_merge.errors import NotFoundError

CODE_CHARACTERS = (60, 240)  # so that nearly every row fits into the laptop recipe's 112 tokens
SENTENCE_CHARACTERS = (15, 110)


@dataclass(frozen=True)
class Function:
    """A function without its docstring, and the first sentence of that.

    Attributes:
        module: path of its file below the standard library.
        name: what it is called, with its classes: `Barrier.wait`.
    """

    module: str
    name: str
    code: str
    sentence: str

    def row(self) -> dict[str, str]:
        """The function as a training row."""
        return {"prompt": prompt_of(self.code), "completion": f" {self.sentence}", "source": self.module}


@dataclass(frozen=True)
class Corpus:
    """Each area's rows to train on, and the rows, from all areas, that every model is judged by."""

    train: Mapping[str, tuple[Function, ...]]
    held_out: tuple[Function, ...]


def prompt_of(code: str) -> str:
    """What the model is asked about a function."""
    return f"Write the docstring of this Python function.\n\n{code}\n\nDocstring:"


def build(areas: Sequence[Area], *, rows: int, held_out_rows: int, library: Path | None = None) -> Corpus:
    """Rows for a client of each area, and held-out rows from all; no module, name or code is in both.

    Args:
        rows: at most so many a client.
        held_out_rows: at most so many in all, as many from each area.
        library: the standard library's folder; None is this Python's.

    Raises:
        NotFoundError: an area has no sources there.
    """
    root = library or Path(sysconfig.get_path("stdlib"))
    held = {area.name: functions_of(area.held_out, root)[: held_out_rows // len(areas)] for area in areas}
    judged = [function for functions in held.values() for function in functions]
    seen = {function.name for function in judged} | {function.code for function in judged}
    train = {
        area.name: tuple(f for f in functions_of(area.train, root) if f.name not in seen and f.code not in seen)[:rows]
        for area in areas
    }
    for name in train:
        if not train[name] or not held[name]:
            raise NotFoundError(
                f"The sources of Python's standard library are not in {root}: nothing to train {name} on.",
                hint="Some installations leave them out; use a Python that has them.",
            )
    return Corpus(train, tuple(judged))


def write(corpus: Corpus, folder: Path, *, force: bool = False) -> dict[str, int]:
    """Write the corpus as JSON lines: a file a client, and `held-out.jsonl`; returns the rows of each file."""
    parts = {**corpus.train, "held-out": corpus.held_out}
    with atomic_folder(folder, force=force, kind="rows") as work:
        for name, functions in parts.items():
            lines = "".join(json.dumps(function.row(), ensure_ascii=False) + "\n" for function in functions)
            (work / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return {name: len(functions) for name, functions in parts.items()}


def functions_of(modules: Sequence[str], root: Path) -> list[Function]:
    """Every fitting function of `modules`, each code and sentence once, in an order that only their text decides."""
    found: dict[str, Function] = {}
    sentences: set[str] = set()
    for path in sorted(path for module in modules for path in _files(root / module)):
        for function in _functions(path, path.relative_to(root).as_posix()):
            if function.code not in found and function.sentence not in sentences:
                found[function.code] = function
                sentences.add(function.sentence)
    return sorted(found.values(), key=lambda function: hashlib.sha256(repr(function).encode()).digest())


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from path.rglob("*.py")


def _functions(path: Path, module: str) -> Iterator[Function]:
    source = path.read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the parser thinks of the standard library's escape sequences
        tree = ast.parse(source)
    for name, node in _definitions(tree, ""):
        docstring = ast.get_docstring(node)
        if docstring is None or len(node.body) < 2:
            continue
        function = Function(module, name, _code(node, source.splitlines()), _sentence(docstring))
        if _fits(function):
            yield function


def _definitions(node: ast.AST, within: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        name = getattr(child, "name", None)
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{within}{name}", child
        elif isinstance(child, ast.ClassDef):
            yield from _definitions(child, f"{within}{name}.")


def _code(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]) -> str:
    """The function's own lines but for its docstring and decorators."""
    docstring = node.body[0]
    kept = [*lines[node.lineno - 1 : docstring.lineno - 1], *lines[docstring.end_lineno : node.end_lineno]]
    return textwrap.dedent("\n".join(line.rstrip() for line in kept if line.strip()))


def _sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    first, dot, _ = paragraph.partition(". ")
    return first + dot.strip()


def _fits(function: Function) -> bool:
    code, sentence = len(function.code), len(function.sentence)
    return (
        CODE_CHARACTERS[0] <= code <= CODE_CHARACTERS[1]
        and SENTENCE_CHARACTERS[0] <= sentence <= SENTENCE_CHARACTERS[1]
        and function.sentence.endswith(".")
        and "NotImplementedError" not in function.code
    )
