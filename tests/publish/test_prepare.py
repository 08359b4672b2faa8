"""What may leave a folder: allow-listed files of an adapter that we accept, without a secret or a path in them."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lora_merge.errors import NotFoundError, RefusedError, UsageError
from lora_merge.publish.files import RecordFile, read_records, weights_files
from lora_merge.publish.prepare import Prepared, prepare
from tests.publish.conftest import client_folder

REPO = "org/published"
SECRET = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1dF3h"


def names(prepared: Prepared) -> set[str]:
    return {file.name for file in prepared.files}


def card(prepared: Prepared) -> str:
    [found] = [file for file in prepared.files if file.name == "README.md"]
    assert isinstance(found, RecordFile)
    return found.content.decode()


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder: Path) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        prepare(folder, REPO)
    return caught.value


def test_only_what_belongs_to_an_adapter_leaves_the_folder(client_a: Path) -> None:
    for stranger in ("training_args.bin", "optimizer.pt", "tokenizer.json", ".env", "trainer_state.json"):
        (client_a / stranger).write_text(SECRET)
    (client_a / "checkpoint-1").mkdir()
    prepared = prepare(client_a, REPO)
    assert names(prepared) == {"adapter_config.json", "adapter_model.safetensors", "lora_merge.json", "README.md"}
    assert set(prepared.left_out) == {
        *("training_args.bin", "optimizer.pt", "tokenizer.json", ".env", "trainer_state.json", "checkpoint-1")
    }


def test_a_merged_adapter_takes_its_ledger_and_its_lock_along(merged: Path) -> None:
    assert {"aggregation.json", "lora-merge.lock"} <= names(prepare(merged, REPO))


def test_a_path_that_a_ledger_keeps_of_a_client_is_not_published(merged: Path) -> None:
    contributions = json.loads((merged / "aggregation.json").read_text())["contributions"]
    contributions[0]["claims"]["base_model_name_or_path"] = "/home/me/llama"
    edit(merged / "aggregation.json", contributions=contributions)
    assert f"the base model of {contributions[0]['client_id']} is named by a path" in str(refusal(merged))


@pytest.mark.parametrize("path", ["/data/lab/secret", "file:///srv/x", "~/x", "~me/x", "D:\\lab", "\\\\srv\\lab"])
@pytest.mark.parametrize(
    ("field", "form"),
    [
        ("auto_mapping.parent_library", {"auto_mapping": {"parent_library": "PATH"}}),
        ("revision", {"revision": "PATH"}),
        ("layers_pattern.1", {"layers_pattern": ["layers", "PATH"]}),
        ("runtime_config", {"runtime_config": {"PATH": True}}),
    ],
)
def test_a_path_in_a_field_of_the_config_that_no_merge_reads_is_refused(
    client_a: Path, field: str, form: dict[str, Any], path: str
) -> None:
    edit(client_a / "adapter_config.json", **json.loads(json.dumps(form).replace("PATH", json.dumps(path)[1:-1])))
    error = refusal(client_a)
    assert [problem.field for problem in error.problems] == [f"adapter_config.json, {field}"]
    assert "lab" not in str(error).replace(str(client_a), "")


def test_a_path_in_a_statement_in_a_record_of_a_merge_or_in_a_tensor_files_header_is_refused(
    client_a: Path, merged: Path
) -> None:
    recipe = {"name": "/data/lab/r.yaml", "digest": "a" * 64, "overrides": {"a": ["/data/lab/x"]}}
    edit(client_a / "lora_merge.json", recipe=recipe)
    path = client_a / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"made_from": "/data/lab/x"})
    assert {problem.field for problem in refusal(client_a).problems} == {
        "lora_merge.json, recipe.name",
        "lora_merge.json, recipe.overrides.a.0",
        "adapter_model.safetensors, __metadata__.made_from",
    }
    contributions = json.loads((merged / "aggregation.json").read_text())["contributions"]
    contributions[0]["recipe"] = recipe
    edit(merged / "aggregation.json", contributions=contributions)
    assert "aggregation.json, contributions.0.recipe.name" in {problem.field for problem in refusal(merged).problems}


def test_what_only_begins_like_a_path_is_let_through(client_a: Path) -> None:
    edit(client_a / "adapter_config.json", exclude_modules=["/", "~", "C:", "\\.x", "a/b", "https://example.org/x"])
    assert prepare(client_a, REPO).files


def test_nothing_is_written(client_a: Path) -> None:
    before = {path.name: path.read_bytes() for path in client_a.iterdir()}
    prepare(client_a, REPO)
    assert {path.name: path.read_bytes() for path in client_a.iterdir()} == before


def test_a_folder_that_the_strict_reader_refuses_is_not_published(client_a: Path) -> None:
    edit(client_a / "adapter_config.json", use_qalora=True)
    assert "use_qalora" in str(refusal(client_a))


def test_a_folder_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        prepare(tmp_path / "nothing", REPO)


@pytest.mark.parametrize("name", ["aggregation.json", "lora-merge.lock"])
def test_a_broken_record_is_not_published(merged: Path, name: str) -> None:
    edit(merged / name, surprise=1)
    assert name in str(refusal(merged))


@pytest.mark.parametrize(
    "path", ["/srv/models/llama", "./llama", "../llama", "~/llama", "a/b/c", "C:\\models\\llama", "models\\llama", ".."]
)
def test_a_path_as_the_base_models_name_is_refused_and_never_guessed(tmp_path: Path, path: str) -> None:
    error = refusal(client_folder(tmp_path / "client", base=path))
    assert {problem.field for problem in error.problems} == {
        "adapter_config.json, base_model_name_or_path",
        "lora_merge.json, base_model.repo",
    }
    assert "org/model" in error.hint


def test_a_name_that_is_a_folder_here_may_be_either_and_is_refused(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base").mkdir(parents=True)
    assert "may be either" in str(refusal(merged))


def test_a_name_that_the_client_states_as_a_repository_is_one(
    client_a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base").mkdir(parents=True)
    assert prepare(client_a, REPO).warnings == []


def test_no_base_model_is_a_warning(tmp_path: Path) -> None:
    [warning] = prepare(client_folder(tmp_path / "client", base=None), REPO).warnings
    assert "names no base model" in warning


@pytest.mark.parametrize("name", ["adapter_config.json", "lora_merge.json", "README.md", "lora-merge.lock.sig"])
def test_a_secret_in_any_text_is_refused_by_file_and_kind_and_never_shown(merged: Path, name: str) -> None:
    if name == "lora_merge.json":
        text = json.dumps({"schema_version": 1, "client_id": "org/x", "versions": {"token": SECRET}})
        (merged / name).write_text(text)
    elif name.endswith(".json"):
        edit(merged / name, exclude_modules=SECRET)
    else:
        (merged / name).write_text(f"---\n{{}}\n---\n\n{SECRET}\n")
    error = refusal(merged)
    assert any(problem.field.startswith(name) for problem in error.problems)
    assert "Hugging Face token" in str(error)
    assert SECRET not in str(error)


@pytest.mark.parametrize(("above", "line"), [("# Mine\n", 2), ("---\nlicense: mit\n---\n# Mine\n", 5)])
def test_a_secret_in_a_card_is_named_by_its_line_in_that_file(client_a: Path, above: str, line: int) -> None:
    (client_a / "README.md").write_text(f"{above}{SECRET}\n")
    [problem] = refusal(client_a).problems
    assert problem.field == f"README.md, line {line}"


def test_a_secret_in_the_metadata_of_the_weights_is_found_too(client_a: Path) -> None:
    path = client_a / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"note": "/home" + "/me/data"})
    error = refusal(client_a)
    assert "adapter_model.safetensors" in str(error)
    assert "home folder" in str(error)


def test_a_link_is_not_followed(client_a: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("something")
    os.symlink(tmp_path / "secret", client_a / "README.md")
    assert "links are not followed" in str(refusal(client_a))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["README.md", "adapter_model.safetensors"])
def test_what_is_no_plain_file_is_refused_at_once(client_a: Path, name: str, make: Callable[[Path], object]) -> None:
    (client_a / name).unlink(missing_ok=True)
    make(client_a / name)
    with pytest.raises(RefusedError, match="is not a plain file"):
        [*read_records(client_a), *weights_files(client_a)]


SWAP = """
import os, sys
plain, link, place = (os.path.join(sys.argv[1], name) for name in ("plain", "link", "README.md"))
while True:
    open(plain, "w").close()
    os.rename(plain, place)
    os.symlink(sys.argv[2], link)
    os.rename(link, place)
"""


def test_a_link_that_takes_a_files_place_at_any_moment_is_not_followed(client_a: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    swapping = subprocess.Popen([sys.executable, "-c", SWAP, client_a, tmp_path / "secret"])
    try:
        end, found = time.monotonic() + 1, set()
        while time.monotonic() < end:
            with contextlib.suppress(RefusedError):
                found.add(read_records(client_a).get("README.md", b""))
    finally:
        swapping.kill()
        swapping.wait()
    assert found == {b""}


def test_a_link_to_a_file_of_the_same_size_and_time_is_another_file(client_a: Path, tmp_path: Path) -> None:
    [file] = weights_files(client_a)
    assert file.unchanged()
    os.rename(file.path, tmp_path / "weights")
    os.symlink(tmp_path / "weights", file.path)
    assert not file.unchanged()
    with pytest.raises(RefusedError, match="links are not followed"):
        file.sha256  # noqa: B018


def test_hashes_are_the_ones_that_git_and_the_hub_have(client_a: Path) -> None:
    (client_a / "README.md").write_text("hello\n")
    empty = RecordFile("a", b"hello\n")
    assert empty.git_oid == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert empty.sha256 == "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"


def test_a_card_that_somebody_wrote_keeps_its_text_and_its_own_metadata(merged: Path) -> None:
    text = "---\nlicense: mit\nlibrary_name: other\ntags:\n- mine\n---\n# My words\n\nAnd no others.\n"
    (merged / "README.md").write_text(text)
    written = card(prepare(merged, REPO))
    assert written.endswith("# My words\n\nAnd no others.\n")
    for line in ("license: mit", "library_name: other", "- mine", "- lora-merge", "base_model: org/base"):
        assert line in written


def test_a_mark_of_the_byte_order_hides_no_metadata(client_a: Path) -> None:
    (client_a / "README.md").write_text("\ufeff---\nlicense: mit\n---\n# My words\n", encoding="utf-8")
    head, _, text = card(prepare(client_a, REPO)).removeprefix("---\n").partition("\n---\n")
    assert "license: mit" in head.splitlines()
    assert text == "# My words\n"


def test_a_card_without_metadata_gets_some(client_a: Path) -> None:
    (client_a / "README.md").write_text("# My words\n")
    written = card(prepare(client_a, REPO))
    assert written.startswith("---\nbase_model: org/base\n")
    assert written.endswith("# My words\n")


@pytest.mark.parametrize("text", ["- a list", "a: [", "a: b: c", f"a: {'[' * 400}{']' * 400}"], ids=range(4))
def test_a_card_whose_metadata_is_no_mapping_is_refused(client_a: Path, text: str) -> None:
    (client_a / "README.md").write_text(f"---\n{text}\n---\n")
    assert "README.md" in str(refusal(client_a))


def test_the_card_that_aggregate_wrote_is_written_anew_with_the_repositorys_name(merged: Path) -> None:
    assert REPO not in (merged / "README.md").read_text()
    assert f"lora-merge verify {REPO}" in card(prepare(merged, REPO))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"models": 3}', '{"data": "x", "rows": 1, "models": [{"name": 1}]}', "not json"]
)
def test_an_evaluation_that_is_none_is_a_usage_error(client_a: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(UsageError):
        prepare(client_a, REPO, evaluation=tmp_path / "evaluation.json")
