"""Does a pruned folder open in an older transformers, and compute the same there?

    python benchmarks/older_transformers.py OTHER/bin/python

A small random Llama is written as transformers 4 writes it (rope_theta at the top of config.json,
tokenizer_class PreTrainedTokenizerFast), pruned in memory and block by block, and opened by the
other interpreter, whose environment holds torch and an older transformers. One JSON line for each
way: the rotary base and tokens that the other one read, and the largest difference of logits to the
same weights here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from prunezero.models.loading.load import load_model
from prunezero.models.saving.save import save_model
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.streamed import prune_streamed

ROTARY_BASE = 500000.0
TEXT = "the cat sees a small red house."
CONFIGURATION = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": ROTARY_BASE,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float16",
    "transformers_version": "4.57.6",
}
# Run by the other interpreter, and by this one: what it reads, and the logits.
OPENING = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, text, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
ids = tokenizer(text)["input_ids"]
config = model.config
theta = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
with torch.no_grad():
    logits = model(torch.tensor([ids * 4])).logits
torch.save(logits, output)
print(json.dumps({
    "transformers": transformers.__version__, "rotary_base": theta, "ids": ids,
    "tokenizer": type(tokenizer).__name__,
}))
"""


def write_source(folder: Path) -> Path:
    """A random Llama, its files as transformers 4 writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig

    rope = {"rope_type": "default", "rope_theta": ROTARY_BASE}
    known = {key: value for key, value in CONFIGURATION.items() if not key.startswith("rope")}
    torch.manual_seed(0)
    network: Any = AutoModelForCausalLM.from_config(LlamaConfig(**known, rope_parameters=rope))
    for parameter in network.parameters():
        # Wide enough that attention depends on the rotary base.
        parameter.data.mul_(8 if parameter.dim() > 1 else 1)
    network.half().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIGURATION, indent=2))
    words = ["<s>", "</s>", "<unk>", *map(chr, range(32, 126))]
    vocabulary = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {**special, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    return folder


def opened(python: str, folder: Path, output: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """What an interpreter reads of a folder, and its logits."""
    command = [python, "-c", OPENING, str(folder), TEXT, str(output)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(printed.strip().splitlines()[-1]), torch.load(output)


def main() -> None:
    """Prune both ways, open each with both interpreters, and print what differs."""
    other = sys.argv[1]
    recipe = Recipe.load("wanda")
    windows = torch.arange(256).reshape(4, 64) % 90 + 3
    with tempfile.TemporaryDirectory(prefix="older-") as name:
        work = Path(name)
        source = write_source(work / "source")
        model = load_model(str(source), device="cpu")
        prune(model, recipe, 0.5, windows=windows)
        save_model(model, work / "in memory")
        prune_streamed(source, recipe, 0.5, work / "streamed", windows=windows, device="cpu")
        for way in ("source", "in memory", "streamed"):
            known, here = opened(sys.executable, work / way, work / "here.pt")
            read, there = opened(other, work / way, work / "there.pt")
            row = {
                "folder": way,
                "same_tokens": read.pop("ids") == known.pop("ids"),
                "here": known,
                "there": read,
                "largest_logit": float(here.abs().max()),
                "largest_difference": float((here - there).abs().max()),
            }
            print(json.dumps(row))


if __name__ == "__main__":
    main()
