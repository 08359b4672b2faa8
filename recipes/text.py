"""Fine-tune a causal language model with LoRA on one client's rows.

    lora-merge train laptop --data rows.jsonl --client-id org/client-1 --output adapter
    python text.py laptop.yaml --data rows.jsonl --client-id org/client-1 --output adapter

Both are the same run. Copy this file and its recipe (`lora-merge recipes copy laptop`), and change what you like:
every client of a federation has to run the same.
"""

from datetime import UTC, datetime

from lora_merge.recipe import LoadedRecipe
from lora_merge.training.agreed import check_agreed_base, check_agreed_start
from lora_merge.training.base_model import add_lora, check_base, find_base, load_model, load_tokenizer
from lora_merge.training.client import Trained, write_client
from lora_merge.training.data import encode_rows, read_rows
from lora_merge.training.fit import fit, pick_device, sound_dtype
from lora_merge.training.job import Job, check_job, work_folder


def train(loaded: LoadedRecipe, job: Job) -> Trained:
    """One client, from rows to an adapter folder."""
    recipe, started = loaded.recipe, datetime.now(UTC)
    check_job(job)
    device = pick_device(job.device)
    rows = read_rows(job.data)
    base = find_base(recipe, job.base, job.tell)
    check_base(base, recipe)
    stated = base.statement()
    check_agreed_base(stated, loaded, job)

    with work_folder(job, loaded, stated) as checkpoint:
        tokenizer = load_tokenizer(base)
        examples = encode_rows(rows, tokenizer, recipe, job.tell)
        dtype = sound_dtype(recipe.dtype, device)
        job.tell(f"{job.client_id}: {len(examples)} examples, {recipe.base_model} on {device} in {dtype}")
        model = add_lora(load_model(base, dtype), recipe)  # lora_A from the shared seed, lora_B zero
        check_agreed_start(model, loaded)
        fitted = fit(model, examples, tokenizer.pad_token_id, recipe, job, device, checkpoint)
        return write_client(model, stated, len(examples), fitted, loaded, job, started)


if __name__ == "__main__":
    from lora_merge.cli.train import run_script

    run_script(train)
