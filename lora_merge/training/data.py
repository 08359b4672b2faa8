"""A client's rows: read them strictly, and turn each into tokens and labels.

A row takes one of three forms: `prompt` and `completion`; `instruction`, `input` (may be left out) and `output`; or
`messages`, whose last one is the answer. Other entries of a row are ignored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from lora_merge.errors import Problem, RefusedError, UsageError
from lora_merge.recipe import Recipe
from lora_merge.training.records import records

IGNORED = -100  # the label that the loss leaves out

_FORMS = {
    "messages": {"messages"},
    "prompt and completion": {"prompt", "completion"},
    "instruction and output": {"instruction", "output"},
}
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{prompt}\n\n{context}### Response:\n"
)


class Message(NamedTuple):
    """One turn of a chat; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        prompt: what is asked: a prompt, an instruction, or the last user message.
        completion: the answer; the only part that is learnt.
        context: the `input` that goes with an instruction, or "".
        before: the messages before the last question of a chat.
    """

    prompt: str
    completion: str
    context: str = ""
    before: tuple[Message, ...] = ()


class Encoded(NamedTuple):
    """A row as tokens; `labels` are -100 on the prompt, both have the same length. `is_cut`: its end is missing."""

    input_ids: list[int]
    labels: list[int]
    is_cut: bool = False


def read_rows(path: str | Path) -> list[Row]:
    """Every row of a JSON lines file (also gzip, or one JSON array), or of anything that `datasets` can read.

    Args:
        path: a file or folder, or a Hub data set's id.

    Raises:
        NotFoundError: there is no such file.
        RefusedError: rows are wrong or empty, each named by its line number; or there is none at all.
        UsageError: the format needs `datasets`, which is not installed.
    """
    rows, problems = [], []
    for where, record in records(str(path)):
        try:
            rows.append(row_of(record))
        except ValueError as error:
            problems.append((where, str(error)))
    if not rows and not problems:
        problems.append(("the file", "holds no rows"))
    if problems:
        raise RefusedError([Problem(Path(path).name, where, reason) for where, reason in problems])
    return rows


def row_of(record: object) -> Row:
    """The row that a parsed JSON object states.

    Raises:
        ValueError: says what is wrong with it.
    """
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError("must be a JSON object")
    forms = [name for name, keys in _FORMS.items() if keys <= set(record)]
    if len(forms) != 1:
        keys = ", ".join(sorted(map(str, record)))[:80]
        found = " and also ".join(forms) or (f"only {keys}" if keys else "nothing")
        raise ValueError(f"must hold one of {'; '.join(_FORMS)}; holds {found}")
    if forms == ["messages"]:
        return _chat_row(record["messages"])
    if forms == ["prompt and completion"]:
        return Row(_filled(record, "prompt"), _filled(record, "completion"))
    return Row(_filled(record, "instruction"), _filled(record, "output"), _text(record, "input").strip())


def encode(row: Row, tokenizer: Any, prompt_form: str, max_length: int) -> Encoded | None:
    """Tokens and labels of a row, cut at `max_length`; None where not one token of the answer would be left.

    The tokenizer's end token closes the answer, unless it was cut off.

    Args:
        tokenizer: of transformers.
        prompt_form: `plain` (prompt and completion as they are), `alpaca`, or `chat` (the tokenizer's template).
        max_length: in tokens.

    Raises:
        UsageError: the row or the tokenizer does not fit the prompt form.
    """
    prompt, whole = render(row, tokenizer, prompt_form)
    special = prompt_form != "chat"  # a chat template writes its own special tokens
    input_ids = list(tokenizer(whole, add_special_tokens=special)["input_ids"])
    if tokenizer.eos_token_id is not None and input_ids[-1:] != [tokenizer.eos_token_id]:
        input_ids.append(tokenizer.eos_token_id)
    # Prompt and answer are tokenised together, as one text is; a token across their border counts as answer.
    prompt_ids = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    asked = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt_ids, input_ids, strict=False)))
    is_cut, input_ids = len(input_ids) > max_length, input_ids[:max_length]
    if len(input_ids) <= max(asked, 1):
        return None
    return Encoded(input_ids, [IGNORED] * asked + input_ids[asked:], is_cut)


def encode_rows(rows: list[Row], tokenizer: Any, recipe: Recipe, tell: Callable[[str], None]) -> list[Encoded]:
    """Every row that the recipe's length leaves an answer of; `tell` hears how many it does not, or not a whole one.

    Raises:
        RefusedError: not one row is left.
    """
    encoded = [encode(row, tokenizer, recipe.prompt_form, recipe.max_length) for row in rows]
    examples = [row for row in encoded if row is not None]
    if not examples:
        reason = f"no row has a prompt below max_length {recipe.max_length}"
        raise RefusedError([Problem("the data", "max_length", reason)])
    if skipped := len(rows) - len(examples):
        tell(f"{skipped} of {len(rows)} rows left out: the prompt alone fills max_length {recipe.max_length}")
    if cut := sum(row.is_cut for row in examples):
        tell(f"{cut} of {len(rows)} rows cut: their answers end after max_length {recipe.max_length}")
    return examples


def render(row: Row, tokenizer: Any, prompt_form: str) -> tuple[str, str]:
    """The text up to the answer, and the whole text with it (without an end token, except in a chat)."""
    if prompt_form == "chat":
        return _render_chat(row, tokenizer)
    if row.before:
        raise UsageError("A chat of more than one question and answer needs the prompt form 'chat'.")
    if prompt_form == "alpaca":
        paired = ", paired with an input that provides further context" if row.context else ""
        context = f"### Input:\n{row.context}\n\n" if row.context else ""
        prompt = _ALPACA.format(paired=paired, prompt=row.prompt, context=context)
    else:
        prompt = _asked(row)
    return prompt, prompt + row.completion


def messages_of(row: Row) -> list[dict[str, str]]:
    """The row as chat messages, without its answer."""
    return [message._asdict() for message in (*row.before, Message("user", _asked(row)))]


def _render_chat(row: Row, tokenizer: Any) -> tuple[str, str]:
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "The base model's tokenizer has no chat template.", hint="Use the prompt form plain or alpaca."
        )
    asked = messages_of(row)
    prompt = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    answered = [*asked, {"role": "assistant", "content": row.completion}]
    whole = str(tokenizer.apply_chat_template(answered, tokenize=False)).rstrip()
    if not whole.startswith(prompt):
        raise UsageError("The base model's chat template rewrites the prompt once it is answered: not supported.")
    return prompt, whole


def _asked(row: Row) -> str:
    return f"{row.prompt}\n\n{row.context}" if row.context else row.prompt


def _chat_row(messages: object) -> Row:
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError("messages must be a list that ends in a user's and an assistant's message")
    turns = [_message(message) for message in messages]
    if [turn.role for turn in turns[-2:]] != ["user", "assistant"]:
        raise ValueError("messages must end in a user's and an assistant's message")
    return Row(turns[-2].content, turns[-1].content, before=tuple(turns[:-2]))


def _message(message: object) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        raise ValueError("each message must hold a role (system, user or assistant) and a content")
    return Message(message["role"], _filled(message, "content"))


def _filled(record: Mapping[str, Any], key: str) -> str:
    if not (text := _text(record, key)).strip():
        raise ValueError(f"{key} is empty")
    return text


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} must be text, is {type(value).__name__}")
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} holds half a character (a lone surrogate)") from None
    return value or ""
