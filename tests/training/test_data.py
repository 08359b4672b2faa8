"""Rows are read strictly, and only answers are learnt."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_merge.errors import NotFoundError, RefusedError, UsageError
from lora_merge.recipe_files import load
from lora_merge.training.data import Message, Row, encode, encode_rows, read_rows, render
from tests.training.conftest import MakeRecipe, byte_tokenizer

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id

FORMS: list[tuple[dict[str, Any], Row]] = [
    ({"prompt": "a", "completion": "b", "domain": "x", "tokens": 3}, Row("a", "b")),
    ({"instruction": "a", "input": "c", "output": "b"}, Row("a", "b", context="c")),
    ({"instruction": "a", "input": "", "output": "b"}, Row("a", "b")),
    ({"instruction": "a", "output": "b"}, Row("a", "b")),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, Row("a", "b")),
    (
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
            ]
        },
        Row("a", "b", before=(Message("system", "s"),)),
    ),
]


def write(path: Path, lines: list[str | bytes]) -> Path:
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


@pytest.mark.parametrize(("record", "row"), FORMS)
def test_every_form_of_a_row_is_read(record: dict[str, Any], row: Row, tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "rows.jsonl", [json.dumps(record)])) == [row]


def test_gzip_one_array_a_byte_order_mark_and_blank_lines_are_read_alike(tmp_path: Path) -> None:
    records = [{"prompt": "a\u2028", "completion": "b"}, {"prompt": "ü", "completion": "d"}]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    expected = [Row("a\u2028", "b"), Row("ü", "d")]
    text = "\r\n\n".join(lines).encode()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "rows.json").write_text(json.dumps(records), encoding="utf-8")
    (tmp_path / "rows.ndjson").write_bytes(b"\xef\xbb\xbf" + text)
    assert read_rows(tmp_path / "rows.jsonl.gz") == expected
    assert read_rows(tmp_path / "rows.json") == expected
    assert read_rows(tmp_path / "rows.ndjson") == expected


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 20_000, "not JSON"),
        (b'{"prompt": "\xff", "completion": "b"}', "not UTF-8"),
        ("null", "must be a JSON object"),
        ("3", "must be a JSON object"),
        ("{}", "holds nothing"),
        ('{"text": "a"}', "holds only text"),
        ('{"prompt": "a"}', "holds only prompt"),
        ('{"prompt": "a", "completion": "b", "instruction": "c", "output": "d"}', "and also"),
        ('{"prompt": "a", "completion": " "}', "completion is empty"),
        ('{"prompt": "", "completion": "b"}', "prompt is empty"),
        ('{"prompt": null, "completion": "b"}', "prompt is empty"),
        ('{"prompt": "a", "completion": 4}', "completion must be text, is int"),
        ('{"prompt": "a", "completion": "\\ud800"}', "surrogate"),
        ('{"instruction": "a", "input": 1, "output": "b"}', "input must be text"),
        ('{"messages": "hello"}', "messages must be a list"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "messages must be a list"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "must end in"),
        ('{"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]}', "role"),
        ('{"messages": ["a", "b"]}', "role"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(line: str | bytes, reason: str, tmp_path: Path) -> None:
    good = '{"prompt": "a", "completion": "b"}'
    with pytest.raises(RefusedError) as caught:
        read_rows(write(tmp_path / "rows.jsonl", [good, "", line, good]))
    (problem,) = caught.value.problems
    assert (problem.client, problem.field) == ("rows.jsonl", "line 3")
    assert reason in problem.reason


def test_all_wrong_rows_are_told_in_order_and_counted_once(tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        read_rows(write(tmp_path / "rows.jsonl", ["{}"] * 120 + ["{"]))
    assert [problem.field for problem in caught.value.problems] == [f"line {n}" for n in range(1, 122)]
    lead, alike, other = caught.value.message.splitlines()
    assert lead == "121 problems in 1 input:"
    assert alike.startswith("  rows.jsonl: line 1 and 119 more: must hold one of ")
    assert other.startswith("  rows.jsonl: line 121: not JSON")
    assert caught.value.hint == ""


@pytest.mark.parametrize("content", [b"", b"\n \n", b"[]"])
def test_a_file_without_rows_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(RefusedError, match="no rows"):
        read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("cut", [0, 5, 25])
def test_a_broken_gzip_file_is_refused(cut: int, tmp_path: Path) -> None:
    whole = gzip.compress(b'{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "rows.jsonl.gz").write_bytes(whole[:cut] if cut else b"not gzip")
    with pytest.raises(RefusedError, match="gzip"):
        read_rows(tmp_path / "rows.jsonl.gz")


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.parquet", "./gone"])
def test_a_missing_file_is_not_found(name: str, tmp_path: Path) -> None:
    if not name.endswith("jsonl"):
        pytest.importorskip("datasets")
    with pytest.raises(NotFoundError, match="There is no data file"):
        read_rows(f"{tmp_path}/{name}")


def test_another_format_without_datasets_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError) as caught:
        read_rows(tmp_path / "rows.parquet")
    assert caught.value.hint == "pip install 'lora-merge[data]'"


def test_a_file_of_no_known_form_is_refused_by_its_name(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "rows.txt").write_text("a", encoding="utf-8")
    with pytest.raises(UsageError, match=r"rows\.txt is of no form that is read: .*\.jsonl, .*\.csv"):
        read_rows(tmp_path / "rows.txt")


def test_parquet_and_csv_are_read_where_datasets_is_installed(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"prompt": ["a", "c"], "completion": ["b", "d"]})
    rows.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\nc,\n", encoding="utf-8")
    assert read_rows(tmp_path / "rows.parquet") == [Row("a", "b"), Row("c", "d")]
    with pytest.raises(RefusedError, match="row 2: completion is empty"):
        read_rows(tmp_path / "rows.csv")


def test_only_the_answer_and_the_end_token_have_labels() -> None:
    encoded = encode(Row("ab", "cd"), TOKENIZER, "plain", 16)
    assert encoded is not None
    assert TOKENIZER.decode(encoded.input_ids) == "abcd<|end|>"
    assert encoded.labels == [-100, -100, *encoded.input_ids[2:]]


def test_a_cut_answer_has_no_end_token() -> None:
    encoded = encode(Row("ab", "cdef"), TOKENIZER, "plain", 4)
    assert encoded is not None
    assert TOKENIZER.decode(encoded.input_ids) == "abcd"


def test_a_prompt_that_fills_the_length_leaves_nothing_to_learn() -> None:
    assert encode(Row("abcd", "e"), TOKENIZER, "plain", 4) is None
    assert encode(Row("abc", "e"), TOKENIZER, "plain", 4) is not None


def test_the_alpaca_form_with_and_without_input() -> None:
    assert render(Row("Add.", "3", context="1, 2"), TOKENIZER, "alpaca") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n"
        "### Response:\n",
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n"
        "### Response:\n3",
    )
    prompt, _ = render(Row("Go {on}.", "3"), TOKENIZER, "alpaca")
    assert prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nGo {on}.\n\n### Response:\n"
    )


def test_the_chat_form_goes_through_the_tokenizers_template() -> None:
    row = Row("a", "b", context="c", before=(Message("system", "s"),))
    encoded = encode(row, TOKENIZER, "chat", 64)
    assert encoded is not None
    learnt = [token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != -100]
    assert TOKENIZER.decode(encoded.input_ids) == "<|system|>s<|end|>\n<|user|>a\n\nc<|end|>\n<|assistant|>b<|end|>"
    assert TOKENIZER.decode(learnt) == "b<|end|>"


def test_a_tokenizer_without_template_and_a_template_that_rewrites_are_refused() -> None:
    bare, moody = byte_tokenizer(), byte_tokenizer()
    bare.chat_template = None
    moody.chat_template = "{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}"
    with pytest.raises(UsageError, match="no chat template"):
        encode(Row("a", "b"), bare, "chat", 64)
    with pytest.raises(UsageError, match="rewrites the prompt"):
        encode(Row("a", "b"), moody, "chat", 64)


@pytest.mark.parametrize("form", ["plain", "alpaca"])
def test_a_longer_chat_needs_the_chat_form(form: str) -> None:
    with pytest.raises(UsageError, match="prompt form 'chat'"):
        encode(Row("a", "b", before=(Message("system", "s"),)), TOKENIZER, form, 64)


def test_rows_without_room_for_an_answer_are_left_out_and_counted(make_recipe: MakeRecipe) -> None:
    said: list[str] = []
    recipe = load(make_recipe(max_length=4)).recipe
    rows = [Row("ab", "c"), Row("abcd", "e"), Row("abcdef", "e")]
    assert len(encode_rows(rows, TOKENIZER, recipe, said.append)) == 1
    assert said == ["2 of 3 rows left out: the prompt alone fills max_length 4"]
    said.clear()
    assert len(encode_rows([Row("ab", "c"), Row("ab", "cd")], TOKENIZER, recipe, said.append)) == 2
    assert said == ["1 of 2 rows cut: their answers end after max_length 4"]  # the end token takes one
    with pytest.raises(RefusedError, match="max_length 4"):
        encode_rows(rows[1:], TOKENIZER, recipe, said.append)


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(deadline=None)
@given(prompt=text, completion=text, max_length=st.integers(2, 40), form=st.sampled_from(["plain", "chat"]))
def test_every_encoded_row_has_an_answer_and_fits(prompt: str, completion: str, max_length: int, form: str) -> None:
    encoded = encode(Row(prompt, completion), TOKENIZER, form, max_length)
    if encoded is None:
        assert len(TOKENIZER(render(Row(prompt, completion), TOKENIZER, form)[0])["input_ids"]) >= max_length
        return
    learnt = [label for label in encoded.labels[1:] if label != -100]
    assert learnt == encoded.input_ids[len(encoded.input_ids) - len(learnt) :]
    assert 1 <= len(learnt) < len(encoded.input_ids) == len(encoded.labels) <= max_length
