"""The house: imports point down, importing is light, and the README's tree and the files agree."""

import ast
import graphlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import lora_merge

PACKAGE = Path(lora_merge.__file__).parent
REPOSITORY = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# A room is a file or a folder of the package. It imports only from rows below its own, and from itself.
ROWS = (
    ("__main__",),
    ("cli",),
    ("demo", "watching"),
    ("federation", "forecast", "inspection", "verify"),
    ("folding",),
    ("pipeline",),
    ("assembly", "defence", "evaluation", "locking", "provenance", "publish"),
    ("intake", "kept", "recorded"),
    ("screening", "training"),
    ("agreement", "options", "recipe_files", "sources"),
    ("card", "checkpoint", "environment", "hub"),
    ("aggregation", "ledger", "lock", "recipe"),
    ("adapter", "ledger_form", "recipe_form", "statement"),
    ("errors", "interrupts"),
)
HEIGHT = {room: -row for row, rooms in enumerate(ROWS) for room in rooms}

HEAVY = {"torch", "transformers", "peft", "huggingface_hub", "datasets", "numpy", "safetensors", "yaml"}
# Written so that it does not match itself. /home/me and /home/x are made up.
MACHINE_PATH = re.compile(r"[/](work|root)/|[/]home/(?!(me|x)\b)\w|[/]tmp/venv")
TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "lora_merge", "recipes", "tests"}


def name_of(path: Path) -> str:
    """`lora_merge.cli.main` for lora_merge/cli/main.py."""
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function; `from x import y` as y where y is a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in NAMES else str(node.module)


NAMES = {name_of(path) for path in MODULES}


def room_of(module: str) -> str:
    """The part of the package that a module lies in; the package itself is empty."""
    return module.partition(".")[2].partition(".")[0]


def test_imports_point_down() -> None:
    upward = [
        f"{name_of(path)} imports {imported}"
        for path in MODULES
        for imported in imports_of(path)
        if (mine := room_of(name_of(path))) and (other := room_of(imported)) and imported in NAMES
        if mine != other and HEIGHT[other] >= HEIGHT[mine]
    ]
    assert upward == []


def test_every_room_has_its_row() -> None:
    assert {room_of(name) for name in NAMES} - {"", *HEIGHT} == set()


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {name_of(path): {i for i in imports_of(path) if i in NAMES - {"lora_merge"}} for path in MODULES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(NAMES)


def test_the_algebra_knows_tensors_and_nothing_else() -> None:
    known = {"torch", "lora_merge", *sys.stdlib_module_names} - {"pathlib", "logging", "time", "random", "json"}
    for path in (PACKAGE / "aggregation").glob("*.py"):
        assert {imported.partition(".")[0] for imported in imports_of(path)} <= known, path.name
        rooms = {room_of(imported) for imported in imports_of(path) if imported in NAMES}
        assert rooms <= {"aggregation", "adapter", "errors"}, path.name


def test_only_the_command_line_knows_the_terminal_libraries() -> None:
    users = {
        room_of(name_of(path)) for path in MODULES if {"typer", "rich"} & {i.split(".")[0] for i in imports_of(path)}
    }
    assert users == {"cli"}


def test_importing_the_package_and_its_commands_loads_nothing_heavy() -> None:
    code = f"import sys, lora_merge, lora_merge.cli.main; print(*sorted({HEAVY!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""


def test_the_public_names() -> None:
    assert lora_merge.__all__ == ["Aggregation", "Fold", "__version__", "aggregate", "fold"]
    assert all(getattr(lora_merge, name) is not None for name in lora_merge.__all__)
    assert set(lora_merge.__all__) <= set(dir(lora_merge))
    assert lora_merge.aggregate.__module__ == lora_merge.Aggregation.__module__ == "lora_merge.pipeline"


def files_of_the_repository() -> list[Path]:
    """What is in version control; in an unpacked archive, everything."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode == 0:
        paths = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [path for top in TOP_LEVEL for path in (REPOSITORY / top, *(REPOSITORY / top).rglob("*"))]
    return [path for path in paths if path.is_file() and path.suffix != ".pyc"]


def test_the_top_level_is_what_it_was_agreed_to_be() -> None:
    shown = {path.relative_to(REPOSITORY).parts[0] for path in files_of_the_repository()}
    assert {name for name in shown if not name.startswith(".")} == TOP_LEVEL


def test_no_file_holds_a_path_of_somebodys_machine() -> None:
    holders = [
        f"{path.relative_to(REPOSITORY)}: {found.group()}"
        for path in files_of_the_repository()
        if "secrets" not in path.name  # what looks for such paths names them
        if (found := MACHINE_PATH.search(path.read_text(encoding="utf-8", errors="replace")))
    ]
    assert holders == []


def test_the_readmes_tree_names_every_file_of_the_package_and_none_that_is_gone() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    files = Counter(path.name for path in MODULES if path.name != "__init__.py")
    named = Counter(re.findall(r"\b\w+\.py\b", readme))
    assert sorted((files - named).elements()) == []
    assert sorted(set(named) - {path.name for path in files_of_the_repository()}) == []
