"""Prunes a folder by llm-compressor, in its own environment, for `pruning.py`, which starts this.

Its `oneshot` is given the dense model, already loaded, and the same token windows as the others.
Only that call is timed: it finds the model's parts, calibrates and prunes.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from seconds_and_memory import measured


def main() -> None:
    """Prune, save the pruned model, and write what was measured as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path, help="JSON of what to prune")
    job = json.loads(parser.parse_args().job.read_text())
    torch.set_num_threads(job["threads"])
    begin = time.perf_counter()
    model, tokenizer = load(job)
    loading = time.perf_counter() - begin
    found = measured(prunes(job, model, tokenizer))
    # The wrapped saving of compressed tensors has nothing to do for plain zeros.
    model.save_pretrained(job["pruned"], save_compressed=False)
    tokenizer.save_pretrained(job["pruned"])
    versions = {name: version(name) for name in ("llmcompressor", "torch", "transformers")}
    row = found | {"load_seconds": loading, "versions": versions}
    Path(job["result"]).write_text(json.dumps(row))


def load(job: dict[str, Any]) -> tuple[Any, Any]:
    """The dense model, all of it in memory, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = getattr(torch, job["dtype"])
    model = AutoModelForCausalLM.from_pretrained(job["dense"], dtype=dtype)
    for weight in model.parameters():
        # A file that is only mapped would be read from the disk while the clock runs.
        weight.sum()
    return model.eval(), AutoTokenizer.from_pretrained(job["dense"])


def prunes(job: dict[str, Any], model: Any, tokenizer: Any) -> Any:
    """The pruning as a call without arguments; text and modifier are ready before it."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    modifiers = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}
    structure = "0:0"
    if job["pattern"] != "free":
        # It names how many of the columns go, where the papers name how many stay.
        keep, of = map(int, job["pattern"].split(":"))
        structure = f"{of - keep}:{of}"
    modifier = modifiers[job["method"]](
        sparsity=job["sparsity"],
        mask_structure=structure,
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )
    ids = json.loads(Path(job["windows"]).read_text())["calibration"]
    text = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(ids[0])] * len(ids)})
    return lambda: oneshot(
        model=model,
        processor=tokenizer,
        dataset=text,
        recipe=[modifier],
        pipeline="sequential",
        max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )


if __name__ == "__main__":
    main()
