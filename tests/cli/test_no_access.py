"""What is there and may not be read is exit 4, says whose file it is, and blames nothing else."""

import builtins
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import Run, lora_merge
from tests.cli.test_aggregate import client
from tests.evaluation.conftest import adapters, held_out
from tests.training.conftest import base

__all__ = ["adapters", "base", "held_out", "lora_merge"]  # fixtures


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """`lock(path)`: nobody may read it, or what is in it. Not by chmod, which stops no administrator."""

    def locks(path: Path) -> None:
        def denied(asked: Any) -> bool:
            here = Path(asked) if isinstance(asked, str | os.PathLike) else Path()
            return path in (here, *here.parents)

        def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(asked: Any, *rest: Any, **named: Any) -> Any:
                if denied(asked):
                    raise PermissionError(13, "Permission denied", str(asked))
                return real(asked, *rest, **named)

            return call

        access = os.access
        monkeypatch.setattr(os, "access", lambda asked, mode: not denied(asked) and access(asked, mode))
        for module, name in ((os, "open"), (io, "open"), (builtins, "open"), (os, "listdir"), (os, "scandir")):
            monkeypatch.setattr(module, name, guarded(getattr(module, name)))

    return locks


@pytest.mark.parametrize("part", ["", "adapter_config.json", "adapter_model.safetensors", "lora_merge.json"])
@pytest.mark.parametrize("command", [("aggregate", "-o", "global"), ("check",), ("inspect",)])
def test_an_adapter_that_may_not_be_read(
    part: str, command: tuple[str, ...], lora_merge: Run, lock: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = client(tmp_path / "theirs")
    lock(folder / part)
    code, _, err = lora_merge(command[0], str(folder), *command[1:])
    assert code == 4, err
    assert "denied" in err.lower()
    assert str(folder / part) in err
    assert not (tmp_path / "global").exists()


@pytest.mark.parametrize("part", ["", "model.safetensors", "config.json", "tokenizer.json"])
def test_a_base_that_may_not_be_read(
    part: str,
    base: Path,
    adapters: tuple[Path, ...],
    held_out: Path,
    lora_merge: Run,
    lock: Callable[[Path], None],
) -> None:
    lock(base / part)
    for command in (("evaluate", "--data", str(held_out)), ("export", "-o", "out")):
        code, _, err = lora_merge(command[0], str(adapters[2]), "--base", str(base), *command[1:])
        assert code == 4, err
        assert "denied" in err.lower()


def test_rows_that_may_not_be_read(
    base: Path, held_out: Path, lora_merge: Run, lock: Callable[[Path], None], tmp_path: Path
) -> None:
    lock(held_out)
    run = ("train", "laptop", "--data", str(held_out), "--client-id", "org/a", "--base", str(base), "--output", "out")
    code, _, err = lora_merge(*run)
    assert code == 4, err
    assert "denied" in err.lower()
    assert not (tmp_path / "out").exists()


def test_what_is_written_is_as_open_as_the_umask_says(base: Path, adapters: tuple[Path, ...], lora_merge: Run) -> None:
    before = os.umask(0o027)
    try:
        assert lora_merge("export", str(adapters[2]), "--base", str(base), "-o", "out", "-q")[0] == 0
        assert lora_merge("aggregate", *map(str, adapters[:2]), "-o", "global", "-q")[0] == 0
    finally:
        os.umask(before)
    for folder in (Path("out"), Path("global")):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o750
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}
