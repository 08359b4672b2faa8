"""`lora-merge train`: one client's fine-tuning."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_merge.cli.output import DebugOption, JsonOption, Output, QuietOption, plain
from lora_merge.cli.push import (
    CreatePrOption,
    PrivateOption,
    PushOption,
    may_publish,
    publish_result,
    push_record,
    push_summary,
)
from lora_merge.cli.recipes import SetOption, recipe_names
from lora_merge.cli.waiting import MaxWaitOption
from lora_merge.hub.waiting import MAX_WAIT, waiting_at_most

if TYPE_CHECKING:
    from lora_merge.recipe import LoadedRecipe
    from lora_merge.training.client import Trained
    from lora_merge.training.job import Job, Step

    Script = Callable[[LoadedRecipe, Job], Trained]

SECONDS_BETWEEN_LINES = 20.0


def train(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(
            help="A shipped recipe's name, a YAML file, or a federation: ORG/NAME.", autocompletion=recipe_names
        ),
    ],
    data: Annotated[str, typer.Option(help="The client's rows: JSON lines (also .gz), or what `datasets` can read.")],
    client_id: Annotated[str, typer.Option(help="Who this is: ORG/NAME, or a NAME.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The adapter folder to make.")],
    base: Annotated[
        Path | None,
        typer.Option(help="A folder with the recipe's base model; its weights are compared in a federation only."),
    ] = None,
    set_: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that is already there.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    push: PushOption = None,
    private: PrivateOption = None,
    create_pr: CreatePrOption = False,
    max_wait: MaxWaitOption = MAX_WAIT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Fine-tune one client's LoRA adapter by a recipe that the whole federation shares.

    Example: lora-merge train laptop --data mine.jsonl --client-id org/client-1 --output client-1
    """
    out = Output(as_json, quiet, debug)
    resumed = "The same command with --resume goes on from the last checkpoint, or anew if there is none yet."
    with out.reporting(resumed), waiting_at_most(max_wait):
        from lora_merge.training.job import Job, check_job

        target = may_publish(out, push, private, create_pr, max_wait)  # now, and not after hours of training
        loaded = _recipe(out, recipe, set_ or [], max_wait)
        with _steps(out) as on_step:
            job = Job(data, client_id, output, base, device, resume, force, out.say, on_step)
            check_job(job)  # the script does so too; here it takes no seconds of imports
            script: Script = context.obj or _script(loaded)
            quieten()
            trained = script(loaded, job)
        pushed = publish_result(out, output, target, max_wait)
        record = _record(trained) | push_record(pushed)
        out.result(record, made=str(output), show=lambda: plain(_summary(trained) + push_summary(pushed)))


def run_script(script: "Script") -> None:
    """Run a recipe's script by itself, with the options of `lora-merge train`."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(train)
    app(obj=script)


def _recipe(out: Output, name: str, overrides: list[str], max_wait: float) -> "LoadedRecipe":
    """The recipe: a shipped one, a file, or that of a federation on the Hub."""
    from lora_merge.recipe_files import is_repository, load

    if not is_repository(name):
        return load(name, overrides)
    from lora_merge.federation.follow import follow

    return follow(name, overrides, max_wait=max_wait, tell=out.say)


def _script(loaded: "LoadedRecipe") -> "Script":
    """The function `train` of the script that the recipe names."""
    import runpy

    from lora_merge.errors import UsageError
    from lora_merge.recipe_files import script_of

    path = script_of(loaded)
    function = runpy.run_path(str(path)).get("train")
    if not callable(function):
        raise UsageError(f"{path} defines no function train(loaded, job).")
    return function  # type: ignore[no-any-return]


def quieten() -> None:
    """Leave the terminal to us: no bars and no notes from the libraries below."""
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", module=r"(transformers|peft|accelerate|torch)\b")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def _steps(out: Output) -> Iterator[Callable[["Step"], None]]:
    """A bar that opens at the first step, and a line now and then."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        state: dict[str, Any] = {"advance": None, "step": 0, "said": time.monotonic()}

        def on_step(step: "Step") -> None:
            if state["advance"] is None:
                state["advance"] = stack.enter_context(out.progress("training", step.steps, "steps"))
            state["advance"](step.step - state["step"])
            state["step"] = step.step
            if time.monotonic() - state["said"] > SECONDS_BETWEEN_LINES:
                state["said"] = time.monotonic()
                out.say(
                    f"step {step.step} of {step.steps}, loss {step.loss:.3f}, "
                    f"{step.tokens_per_second:.0f} tokens a second, {step.seconds_left:.0f} s left"
                )

        yield on_step


def _record(trained: "Trained") -> dict[str, Any]:
    fitted, statement = trained.fitted, trained.statement
    return {
        "output": str(trained.output),
        "client_id": statement.client_id,
        "num_examples": statement.num_examples,
        "steps": fitted.steps,
        "loss": {"first": fitted.loss_first, "last": fitted.loss_last},
        "tokens": fitted.tokens,
        "seconds": fitted.seconds,
        "tokens_per_second": fitted.tokens_per_second,
    }


def _summary(trained: "Trained") -> str:
    fitted, statement = trained.fitted, trained.statement
    return (
        f"{trained.output}: {statement.client_id}, {statement.num_examples} examples, {fitted.steps} steps, "
        f"loss {fitted.loss_first:.3f} to {fitted.loss_last:.3f}, {fitted.tokens_per_second:.0f} tokens a second, "
        f"{fitted.seconds:.0f} s"
    )
