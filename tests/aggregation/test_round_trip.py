"""What was written is an adapter like any other: it can be read, merged again, and gives the same function."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_merge import aggregate
from lora_merge.errors import RefusedError
from lora_merge.screening.stops import Screening
from tests import models
from tests.adapters import KINDS, PLAIN, Kind, clients, edited
from tests.conftest import Federations, digests
from tests.dense import error, mean_model

Folders = tuple[Path, ...]
TOLERANCE = 5e-6
MERGED = Screening(allow_merged=True)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_merged_adapter_merged_alone_is_the_same_function(
    kind: Kind, federations: Federations, tmp_path: Path
) -> None:
    made = federations(kind)
    aggregate(made.clients, tmp_path / "once", base=made.base_argument)
    aggregate([tmp_path / "once"], tmp_path / "twice", weights="uniform", base=made.base_argument, screening=MERGED)
    assert error(kind, tmp_path / "twice", mean_model(kind, made.clients, kind.weights)) < TOLERANCE


def test_two_halves_merged_apart_and_then_together_are_the_whole(plain: Folders, tmp_path: Path) -> None:
    aggregate(plain[:2], tmp_path / "half")
    aggregate(
        [tmp_path / "half", plain[2]], tmp_path / "global", weights={"half": 30, "org/client-2": 30}, screening=MERGED
    )
    assert error(PLAIN, tmp_path / "global", mean_model(PLAIN, plain, PLAIN.weights)) < TOLERANCE


def test_half_precision_survives_being_merged_again(plain: Folders, tmp_path: Path) -> None:
    aggregate(plain, tmp_path / "bf16", dtype="bf16")
    assert {t.dtype for t in load_file(tmp_path / "bf16" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    aggregate([tmp_path / "bf16"], tmp_path / "again", weights="uniform", screening=MERGED)
    assert error(PLAIN, tmp_path / "again", mean_model(PLAIN, [tmp_path / "bf16"], [1.0])) < TOLERANCE


def test_the_output_holds_its_five_files_and_can_be_read_by_others(plain: Folders, tmp_path: Path) -> None:
    aggregate(plain, tmp_path / "global")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "global").iterdir()}
    wanted = {"adapter_config.json", "adapter_model.safetensors", "aggregation.json", "lora-merge.lock", "README.md"}
    assert set(modes) == wanted
    assert {mode | 0o022 for mode in modes.values()} == {0o666}


def test_nothing_that_was_written_says_where_it_was_made(plain: Folders, tmp_path: Path) -> None:
    aggregate(plain, tmp_path / "global")
    for path in (tmp_path / "global").iterdir():
        assert str(tmp_path.parent).encode() not in path.read_bytes()


def test_a_folders_name_cannot_put_markup_or_control_characters_into_the_card(plain: Folders, tmp_path: Path) -> None:
    name = "a|b\x1b[31m\n# Title <script>`[x](http://y)\u202e"
    odd = edited(plain[0], tmp_path / "in" / name)
    (odd / "lora_merge.json").unlink()
    aggregate([odd, plain[1]], tmp_path / "global", weights="uniform")
    card = (tmp_path / "global" / "README.md").read_text()
    assert all(char == "\n" or char.isprintable() for char in card)
    assert "# Title" not in card
    assert "<script>" not in card
    assert "](http" not in card


def test_the_ledger_says_who_went_in_with_which_weight(plain: Folders, tmp_path: Path) -> None:
    aggregate(plain, tmp_path / "global")
    ledger = json.loads((tmp_path / "global" / "aggregation.json").read_text())
    assert [c["client_id"] for c in ledger["contributions"]] == ["org/client-0", "org/client-1", "org/client-2"]
    assert [c["num_examples"] for c in ledger["contributions"]] == [10, 20, 30]
    assert [c["share"] for c in ledger["contributions"]] == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    for contribution, folder in zip(ledger["contributions"], plain, strict=True):
        assert contribution["sha256"].items() <= digests(folder).items()
        assert "adapter_model.safetensors" in contribution["sha256"]


def test_old_mixtral_adapters_are_merged_as_peft_reads_them(tmp_path: Path) -> None:
    """transformers 4 kept each expert as linear layers; PEFT fuses their LoRA when it loads them."""
    kind = Kind("Mixtral of transformers 4", models.mixtral, clients({}, {}))
    folders = [old_mixtral(tmp_path / f"client-{i}", seed=i) for i in range(2)]
    aggregate(folders, tmp_path / "global", weights={"client-0": 1, "client-1": 3})
    assert error(kind, tmp_path / "global", mean_model(kind, folders, [0.25, 0.75])) < 1e-5


def old_mixtral(folder: Path, seed: int) -> Path:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for expert in range(3):
        for layer, (d_out, d_in) in {"w1": (12, 16), "w2": (16, 12), "w3": (12, 16)}.items():
            name = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{layer}"
            tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(2, d_in, generator=generator)
            tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(d_out, 2, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["w1", "w2", "w3"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_rank_above_1024_is_accepted_of_a_merged_adapter_only(tmp_path: Path) -> None:
    from tests.large import write_client

    folders = [write_client(tmp_path / f"client-{i}", seed=i, modules=1, width=1100, rank=600) for i in range(2)]
    wide = aggregate(folders, tmp_path / "global", certificate="off")
    assert any("--rank" in warning for warning in wide.warnings)  # servers refuse a rank above 512
    aggregate([tmp_path / "global"], tmp_path / "again", weights="uniform", certificate="off", screening=MERGED)
    stranger = edited(tmp_path / "global", tmp_path / "stranger")
    (stranger / "aggregation.json").unlink()
    with pytest.raises(RefusedError, match="1024"):
        aggregate([stranger], tmp_path / "refused", weights="uniform")
