"""`lora-merge demo`: the whole loop on this machine, as the commands that anybody could type."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_merge.cli.evaluate import drawn
from lora_merge.cli.output import DebugOption, JsonOption, Output, QuietOption, plain

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_merge.demo.steps import Plan

SETTINGS = "demo.json"
# What --force removes; the base model stays, for it depends on no option.
MADE = ("data", "clients", "global", "logs", "evaluation.json", "commands.sh", SETTINGS)
_BEGINNING = (
    "{clients} organisations fine-tune one model apart, each on rows of its own; one merge of what they learnt makes",
    "the global model. For four, that takes about four minutes on two cores. Everything goes into {output}, and stays.",
)


class Part(StrEnum):
    """What `--only` makes."""

    data = "data"
    model = "model"


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Everything goes into this folder, and stays.")] = Path(
        "lora-merge-demo"
    ),
    base: Annotated[
        Path | None, typer.Option(help="A base model's folder.  [default: SmolLM2-135M-Instruct, made here]")
    ] = None,
    clients: Annotated[int, typer.Option(min=2, max=4, help="Organisations; each has an area of its own.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each client, of 8 rows.")] = 9,
    only: Annotated[Part | None, typer.Option(help="Make one part, and stop.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Start anew; the base model is kept.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Fine-tune a small model at four clients, merge once, and compare: real data, about four minutes on two cores.

    Run again after an interruption, it goes on from what is there.

    Example: lora-merge demo --output my-demo
    """
    out = Output(as_json, quiet, debug)
    with out.reporting(resume="The same command goes on from what is there."):
        from lora_merge.demo.areas import AREAS
        from lora_merge.demo.steps import plan

        if only is Part.data:
            _make_data(out, output, clients, steps, force)
        elif only is Part.model:
            _make_model(out, output, force)
        else:
            _open(output, {"clients": clients, "steps": steps, "base": str(base) if base else None}, force)
            cores = _cores()
            made = plan(output, AREAS[:clients], steps=steps, base=base, threads=_threads(cores))
            for line in _BEGINNING:
                out.say(line.format(clients=clients, output=output))
            with _stoppable():
                seconds = _run(out, output, made, at_once=min(2, cores))
            record = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
            result = {"output": str(output), "seconds": seconds, "commands": made.commands(), "evaluation": record}
            out.result(result, made=str(output), show=lambda: _ending(output, record))


def _make_data(out: Output, output: Path, clients: int, steps: int, force: bool) -> None:
    from lora_merge.demo.areas import AREAS
    from lora_merge.demo.corpus import build, write
    from lora_merge.demo.steps import BATCH_SIZE, HELD_OUT_ROWS_PER_AREA

    corpus = build(AREAS[:clients], rows=steps * BATCH_SIZE, held_out_rows=clients * HELD_OUT_ROWS_PER_AREA)
    rows = write(corpus, output / "data", force=force)
    text = ", ".join(f"{name} {count}" for name, count in rows.items())
    made = output / "data"
    out.result({"output": str(made), "rows": rows}, made=str(made), show=lambda: plain(f"Rows: {text}"))


def _make_model(out: Output, output: Path, force: bool) -> None:
    from lora_merge.demo.model import make_base

    made = output / "base"
    if not (force and (made / "config.json").is_file()):  # it depends on no option, so it is kept
        make_base(made, out.say)
    out.result({"output": str(made)}, made=str(made), show=lambda: plain(made))


def _open(output: Path, settings: Mapping[str, Any], force: bool) -> None:
    """Make the demo's folder, or take up the one that is there.

    Raises:
        UsageError: it holds something else (also where `force` would start anew), or a demo with other settings.
        NotFoundError: the base model that was given is not there.
    """
    from lora_merge.checkpoint.folder import require_writable
    from lora_merge.checkpoint.overwriting import require_apart
    from lora_merge.errors import NotFoundError, UsageError

    if settings["base"] and not Path(settings["base"]).is_dir():
        raise NotFoundError(f"--base {settings['base']}: there is no such folder.")
    for name in MADE if settings["base"] else ():
        require_apart(output / name, [Path(settings["base"])])
    require_writable(output)
    mark = json.dumps(settings, indent=2) + "\n"
    marked = output / SETTINGS
    if output.exists() and not marked.is_file() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} is there and holds no demo.", hint="Choose another folder: --output DIR")
    if force:
        _require_own(output)
        _remove([output / name for name in MADE])
    if marked.is_file() and marked.read_text(encoding="utf-8") != mark:
        raise UsageError(
            f"{output} holds a demo with other settings: {' '.join(marked.read_text(encoding='utf-8').split())}",
            hint="--force starts anew; or choose another folder: --output DIR",
        )
    (output / "logs").mkdir(parents=True, exist_ok=True)
    (output / "clients").mkdir(exist_ok=True)
    marked.write_text(mark, encoding="utf-8")


def _require_own(output: Path) -> None:
    """Raise `UsageError` where `--force` would remove a file that no demo made."""
    from lora_merge.checkpoint.folder import check_free
    from lora_merge.errors import UsageError

    check_free(output / "data", force=True, kind="rows")
    check_free(output / "global", force=True)
    for adapter in (output / "clients").glob("[!.]*"):
        check_free(adapter, force=True, kind="client")
    if strangers := [path for path in (output / "logs").glob("*") if path.suffix != ".log"]:
        raise UsageError(f"{strangers[0]} is no log of the demo; --force leaves it alone.")


def _run(out: Output, output: Path, plan: "Plan", at_once: int) -> dict[str, float]:
    """Run what is not done yet, stage by stage; returns the seconds of each step that ran."""
    from lora_merge.demo.crew import Crew
    from lora_merge.demo.steps import script

    (output / "commands.sh").write_text(script(plan, Path.cwd()), encoding="utf-8")
    (output / "commands.sh").chmod(0o755)
    crew, seconds, start = Crew(output / "logs", out.say), dict[str, float](), time.monotonic()
    stages = plan.stages()
    for number, (title, steps) in enumerate(stages, start=1):
        if seconds:  # something before was made anew, so what came of its old version must be too
            _remove([step.makes for step in steps])
        due = [step.resumed() for step in steps if not step.makes.exists()]
        out.say()
        out.say(f"{number}/{len(stages)} {title}")
        for path in (step.makes for step in steps if step.makes.exists()):
            out.say(f"  {path} is there already")
        for line in (line for step in due for line in f"  $ {step.shown()}".split("\n")):
            out.say(line)  # a line break in a command stays one, so that it can be pasted into a shell
        began = time.monotonic()
        seconds.update(crew.run(due, at_once))
        if due:
            out.say(f"  {time.monotonic() - began:.0f} s")
    out.say()
    out.say(f"All of it took {time.monotonic() - start:.0f} s.")
    out.say()
    return {name: round(value, 1) for name, value in seconds.items()}


@contextmanager
def _stoppable() -> Iterator[None]:
    """Being told to end is Ctrl-C to us: our children must end too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _ending(output: Path, record: dict[str, Any]) -> "RenderableType":
    from rich.console import Group

    words = f"\nEverything is in {output}, and the commands that made it in {output / 'commands.sh'}."
    return Group(drawn(record), plain(words))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads(cores: int) -> int:
    """Threads of each of two training processes: one each on two cores is faster than one process with both."""
    return min(4, max(1, cores // 2))
