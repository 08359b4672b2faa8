"""`lora-merge evaluate`: the base, each local and the global model, side by side."""

import json
import os
from collections.abc import Mapping
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_merge.cli.output import SCHEMA_VERSION, DebugOption, JsonOption, Output, QuietOption, plain
from lora_merge.cli.waiting import MaxWaitOption
from lora_merge.errors import LoraMergeError, UsageError
from lora_merge.hub.waiting import MAX_WAIT, waiting_at_most

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from lora_merge.evaluation.comparison import Comparison, Question
    from lora_merge.evaluation.intervals import Estimate
    from lora_merge.sources.listing import Listing
LARGE = 1e7
SHOWN_LINES = 6  # of an answer; --json has all


class PromptForm(StrEnum):
    """How a row becomes text."""

    plain = "plain"
    alpaca = "alpaca"
    chat = "chat"


class WeightType(StrEnum):
    """The float type of the base's weights."""

    fp32 = "fp32"
    bf16 = "bf16"


def evaluate(
    adapters: Annotated[
        list[str],
        typer.Argument(help="Clients' adapters and merged ones: folders and globs of them, ORG/NAME, ORG/PATTERN-*."),
    ],
    base: Annotated[str, typer.Option(help="The base model: a folder, or a repository id.")],
    data: Annotated[str, typer.Option(help="Held-out rows: JSON lines (also .gz), or what `datasets` can read.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Show each model's answer to this; may be repeated.")] = None,
    prompt_form: Annotated[
        PromptForm | None, typer.Option(help="Default: the one that the adapters state, else plain.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row, prompt and answer; the rest is cut.")] = 512,
    limit: Annotated[int | None, typer.Option(min=1, help="Measure on so many rows, drawn by --seed.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in one forward pass.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer to a --prompt.")] = 64,
    dtype: Annotated[WeightType, typer.Option(help="Float type of the base's weights.")] = WeightType.fp32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the intervals, and of --limit.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write what --json prints here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the evaluation that is at --output.")] = False,
    max_wait: MaxWaitOption = MAX_WAIT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure held-out loss and perplexity of the base and of every adapter on it, with 95 % intervals.

    The loss is the mean over all answer tokens, in nats a token; the interval is over examples.

    Example: lora-merge evaluate 'clients/*' global --base org/base --data rows.jsonl
    """
    out = Output(as_json, quiet, debug)
    with out.reporting(), waiting_at_most(max_wait):
        if output:
            _check_output(output, [*adapters, base, data], force)
        if any(not each.strip() for each in prompt or ()):
            raise UsageError("--prompt holds nothing to answer.")
        listed = _require_inputs(base, adapters, data, device, out)
        from lora_merge.evaluation.comparison import Question, compare

        question = Question(
            base=base,
            adapters=tuple(adapters),
            data=data,
            prompts=tuple(prompt or ()),
            prompt_form=prompt_form.value if prompt_form else None,
            max_length=max_length,
            limit=limit,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            dtype=dtype.value,
            device=device,
            seed=seed,
            max_wait=max_wait,
        )
        comparison = compare(
            question,
            progress=lambda name, rows: out.progress(name, rows, "rows"),
            tell=out.say,
            warn=out.warn,
            listed=listed,
        )
        record = record_of(question, comparison)
        made = [f"{model['name']} {model['loss']['value']:.4f}" for model in record["models"]]
        try:
            if output:
                _write(output, record, force)
        except LoraMergeError:  # what took long to find is told all the same; under -q only what was made is
            if not quiet:
                out.result(record, show=lambda: drawn(record))
            raise
        out.result(record, made=str(output) if output else made, show=lambda: drawn(record))


def _require_inputs(base: str, adapters: list[str], data: str, device: str, out: Output) -> "Listing | None":
    """Raise where one of them is plainly not there: here that takes no seconds of imports.

    Returns:
        What the Hub lists of the base, where it was asked.
    """
    from lora_merge.environment import device_kind
    from lora_merge.sources.base_models import require_model
    from lora_merge.sources.rooms import open_rooms
    from lora_merge.training.records import check_data

    device_kind(device)
    check_data(data)
    with open_rooms() as rooms:
        rooms.expand([each for each in adapters if rooms.kind(each) == "folder"])
    return require_model(base, out.say)


def _check_output(path: Path, inputs: list[str], force: bool) -> None:
    """Raise where the evaluation could not be written, or would take the place of something else: before the work."""
    from lora_merge.checkpoint.folder import require_writable
    from lora_merge.checkpoint.overwriting import require_apart
    from lora_merge.sources.local import folders_named

    require_apart(path, folders_named(inputs))
    _require_free(path, force)
    require_writable(path)


def _require_free(path: Path, force: bool) -> None:
    if not os.path.lexists(path):
        return
    if not (path.is_file() and _is_evaluation(path)):
        raise UsageError(f"{path} is there and is no evaluation.", hint="Choose another --output.")
    if not force:
        raise UsageError(f"{path} exists already.", hint="Choose another --output, or replace it with --force.")


def _is_evaluation(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"schema_version", "answer_tokens", "models"} <= found.keys()


def _write(path: Path, record: dict[str, Any], force: bool) -> None:
    from lora_merge.checkpoint.folder import require_still, write_file

    require_still(partial(_require_free, path, force), path)
    write_file(path, json.dumps({"schema_version": SCHEMA_VERSION, **record}, indent=2) + "\n")


def record_of(question: "Question", comparison: "Comparison") -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "base": question.base,
        "data": question.data,
        "rows": comparison.rows,
        "rows_left_out": comparison.rows_left_out,
        "rows_cut": comparison.rows_cut,
        "answer_tokens": comparison.answer_tokens,
        "prompt_form": comparison.prompt_form,
        "max_length": question.max_length,
        "dtype": question.dtype,
        "device": comparison.device,
        "seed": question.seed,
        "measure": "nats a token, mean over all answer tokens; 95 % percentile bootstrap over examples",
        "models": [
            {
                "name": score.name,
                "kind": score.kind,
                "loss": _numbers(score.loss),
                "perplexity": _numbers(score.loss.exp()),
                "gain_over_base": _numbers(score.gain_over_base),
                "gain_over_mean_of_locals": _numbers(score.gain_over_locals),
            }
            for score in comparison.scores
        ],
        "answers": [
            {"prompt": prompt, "answers": dict(zip(comparison.models, answers, strict=True))}
            for prompt, answers in zip(comparison.prompts, comparison.answers, strict=True)
        ],
    }


def drawn(record: dict[str, Any]) -> "RenderableType":
    """The tables of a record: losses, what the globals gain over the mean local, and answers."""
    from rich.console import Group

    fates = {"left out as too long": record["rows_left_out"], "cut at their end": record["rows_cut"]}
    told = ", ".join(f"{count} {fate}" for fate, count in fates.items() if count)
    rows = f"{record['rows']} held-out rows{f' ({told})' if told else ''}"
    lead = f"{rows}, {record['answer_tokens']} answer tokens; 95 % intervals over rows"
    parts: list[RenderableType] = [plain(lead), _losses(record["models"])]
    parts += [plain(verdict(model)) for model in record["models"] if model["gain_over_mean_of_locals"]]
    for answer in record["answers"]:
        parts += [plain(f"\n{answer['prompt']}\n"), _answers(answer["answers"])]
    return Group(*parts)


def _losses(models: list[dict[str, Any]]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("model", "loss, nats a token", "perplexity", "gain over base", box=SIMPLE_HEAD, pad_edge=False)
    for model in models:
        style = "bold" if model["kind"] == "global" else "italic" if model["kind"] == "mean of locals" else None
        loss, perplexity, gain = model["loss"], model["perplexity"], model["gain_over_base"]
        digits = 1 if perplexity["value"] < 100 else 0
        gained = with_interval(gain, 3, 2) if gain else ""
        cells = (with_interval(loss, 3, 2), with_interval(perplexity, digits, digits), gained)
        table.add_row(plain(model["name"]), *cells, style=style)
    return table


def verdict(model: dict[str, Any]) -> str:
    """Whether a global model was worth it, in one sentence."""
    gain = model["gain_over_mean_of_locals"]
    if not round(gain["value"], 3):
        return f"{model['name']} equals the mean of the locals: {with_interval(gain, 3, 3)}."
    word = "beats"
    if gain["value"] < 0:
        word = "falls short of"
        gain = {"value": -gain["value"], "low": -gain["high"], "high": -gain["low"]}
    doubt = "" if gain["low"] > 0 else ", which may be chance"
    return f"{model['name']} {word} the mean of the locals by {with_interval(gain, 3, 3)}{doubt}."


def _answers(answers: dict[str, str]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("model", "answer", box=SIMPLE_HEAD, pad_edge=False)
    for name, text in answers.items():
        lines = text.splitlines() or ["(nothing)"]
        more = ["…"] if len(lines) > SHOWN_LINES else []
        table.add_row(plain(name), plain("\n".join(lines[:SHOWN_LINES] + more)))
    return table


def _numbers(estimate: "Estimate | None") -> dict[str, float] | None:
    if estimate is None:
        return None
    return {"value": estimate.value, "low": estimate.interval.low, "high": estimate.interval.high}


def with_interval(numbers: Mapping[str, float], digits: int, interval_digits: int) -> str:
    """A value and its 95 % interval: `2.482 [2.24, 2.73]`."""
    value, low, high = numbers["value"], numbers["low"], numbers["high"]
    return f"{_fixed(value, digits)} [{_fixed(low, interval_digits)}, {_fixed(high, interval_digits)}]"


def _fixed(value: float, digits: int) -> str:
    """So many digits, and no zero below zero; of what fills a table's cell, three."""
    if abs(value) >= LARGE:
        return f"{value:.3g}"
    return f"{round(value, digits) + 0.0:.{digits}f}"
