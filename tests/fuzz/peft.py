"""Whether PEFT loads what came of a mutant: the merged adapter, on the base of its kind, tensor by tensor."""

import json
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_merge.adapter import FactorsSpec, Spec
from lora_merge.checkpoint.peft_folder import open_folder
from tests.adapters import CONFIG, WEIGHTS
from tests.fuzz.subjects import BUILT, Case, Corpus


def loads_in_peft(corpus: Corpus, case: Case) -> bool | None:
    """Merge the mutant again and load the result; None where its modules or task are not those of the kind's base."""
    from random import Random

    from peft import PeftModel, get_peft_model_state_dict

    if corpus.judge(case) != "accepted and merged":
        return None
    kind = corpus.source(Random(f"{case.file} {case.seed}"), case).parent
    tasks = {json.loads((folder / CONFIG).read_text())["task_type"] for folder in (corpus.merged, kind / "exact")}
    if len(tasks) > 1 or not _shapes(corpus.merged).items() <= _shapes(kind / "exact").items():
        return None
    base = next(each for each in BUILT if each.name == kind.name).build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = PeftModel.from_pretrained(base, str(corpus.merged))
        # Of biases, PEFT's own list has only those of the config's kind; it loads all.
        loaded = dict(model.named_parameters()) | get_peft_model_state_dict(model)
    written = load_file(corpus.merged / WEIGHTS)
    lost = [name for name in written if name not in loaded]
    assert not lost, lost[:3]
    other = [name for name, tensor in written.items() if not torch.equal(tensor.float(), loaded[name].float())]
    assert not other, other[:3]
    return True


def _shapes(folder: Path) -> dict[str, Any]:
    with closing(open_folder(folder)) as found:
        return {name: _shape(spec) for name, spec in found.specs.items()}


def _shape(spec: Spec) -> Any:
    if isinstance(spec, FactorsSpec):
        return spec.layout, spec.blocks, spec.d_out, spec.d_in, spec.kernel, spec.bias, spec.magnitude
    return spec
