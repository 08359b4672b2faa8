"""Adapters that do not belong to a base are refused before it is loaded; those of other weights are warned of."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_merge import aggregate
from lora_merge.checkpoint.peft_folder import open_folder
from lora_merge.errors import RefusedError
from lora_merge.evaluation import comparison, merged_model
from lora_merge.evaluation.belonging import require_belonging
from lora_merge.evaluation.comparison import Question, compare
from lora_merge.evaluation.merged_model import export
from lora_merge.evaluation.models import silent
from lora_merge.sources.base_models import FoundBase, weights_sha256
from lora_merge.statement import BaseModel, Statement
from tests import models
from tests.adapters import KINDS, Kind, edited
from tests.aggregation.test_round_trip import old_mixtral
from tests.conftest import Federations
from tests.evaluation.test_models import each_kind

Both = Callable[[Path, list[str]], None]


@pytest.fixture(params=["evaluate", "export"])
def run(request: pytest.FixtureRequest, base: Path, held_out: Path, tmp_path: Path) -> Both:
    """`run(adapter, said)`: evaluate or export an adapter on the base, and collect what is warned of."""

    def evaluate(adapter: Path, said: list[str]) -> None:
        question = Question(str(base), (adapter,), str(held_out), device="cpu")
        compare(question, progress=lambda n, rows: silent(n, rows, ""), tell=lambda line: None, warn=said.append)

    def exported(adapter: Path, said: list[str]) -> None:
        export(adapter, str(base), tmp_path / "model", force=True, tell=lambda line: None, warn=said.append)

    return evaluate if request.param == "evaluate" else exported


def stating(folder: Path, to: Path, sha256: str | None) -> Path:
    """A copy of a client that states that hash of its base's weights."""
    shutil.copytree(folder, to)
    statement = Statement(f"org/{to.name}", BaseModel(weights_sha256=sha256), num_examples=10)
    (to / "lora_merge.json").write_text(statement.to_json())
    return to


def test_other_weights_are_warned_of_whoever_states_them(
    run: Both, base: Path, adapters: tuple[Path, ...], tmp_path: Path
) -> None:
    for name, sha256, warnings in (("own", weights_sha256(base), 0), ("strange", "0" * 64, 1), ("silent", None, 0)):
        clients = [stating(adapters[i], tmp_path / f"{name}-{i}", sha256) for i in (0, 1)]
        merged = aggregate(clients, tmp_path / name).output
        for adapter in (clients[0], merged):
            said: list[str] = []
            run(adapter, said)
            assert len(said) == warnings, adapter
            assert all(str(adapter) in line and "other base weights" in line for line in said)


def test_what_has_another_shape_is_refused_before_the_base_is_loaded(
    run: Both, adapters: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in (comparison, merged_model):
        monkeypatch.setattr(room, "load_base", lambda *_: pytest.fail("the base was loaded"))
    wide = edited(
        adapters[0],
        tmp_path / "wide",
        tensors=lambda t: {k: torch.cat([v, v], dim=1) if "lora_A" in k else v for k, v in t.items()},
    )
    with pytest.raises(RefusedError, match=r"q_proj.*: needs 16x32, and the base model has 16x16") as caught:
        run(wide, [])
    assert "torch" not in caught.value.message
    assert "another base" in caught.value.hint
    assert not (tmp_path / "model").exists()


@each_kind
def test_every_kind_belongs_to_its_own_base(kind: Kind, federations: Federations) -> None:
    made = federations(kind)
    require_belonging(FoundBase("tiny", made.base, None), [open_folder(folder) for folder in made.clients], pytest.fail)


def test_modules_that_peft_renames_have_a_place(tmp_path: Path) -> None:
    base = models.save_base(models.mixtral(), tmp_path / "base")
    require_belonging(FoundBase("tiny", base, None), [open_folder(old_mixtral(tmp_path / "old", seed=0))], pytest.fail)


@pytest.mark.parametrize("name", ["embedding", "tokens", "modules_to_save", "rank and alpha patterns"])
def test_what_the_base_has_not_is_named(name: str, federations: Federations, tmp_path: Path) -> None:
    made = federations(next(kind for kind in KINDS if kind.name == name))
    shutil.copytree(made.base, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    for change, said in (({"num_hidden_layers": 1}, "no such module"), ({"vocab_size": 3, "hidden_size": 32}, "needs")):
        (tmp_path / "other" / "config.json").write_text(json.dumps({**config, **change}))
        if said == "no such module" and name == "embedding":
            continue  # it lies in no layer
        with pytest.raises(RefusedError, match=said):
            require_belonging(FoundBase("other", tmp_path / "other", None), [open_folder(made.clients[0])], print)
