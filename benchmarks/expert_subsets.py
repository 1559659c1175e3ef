"""How much quicker are losses of subsets of experts from products of outputs than from outputs?

    python benchmarks/expert_subsets.py
    python benchmarks/expert_subsets.py --experts 64 --chosen 8 --hidden 512 --inner 128

A random Qwen3-MoE layer loses a quarter of its experts, one subset after another. The rival keeps
the outputs of all experts and adds up, for each subset and sequence, those that the router then
chooses, by its weights; ours is `prunezero/models/observing/subset_losses.py`. Both have the same
router to ask. Written are seconds for each subset, once all experts have run, and by how much the
losses differ.
"""

from __future__ import annotations

import argparse
import time
from itertools import combinations, islice

import torch
from torch import Tensor

from prunezero.models.anatomy.expert_groups import expert_groups
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.editing.routing import narrowed
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.loading.load import wrap_model
from prunezero.models.observing.subset_losses import SubsetLosses, expert_outputs, mixture_of


def main() -> None:
    """Measure both ways on the same subsets."""
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = mixture(arguments)
    (group,) = expert_groups(find_linears(model.model), model)
    tokens = list(torch.randn(arguments.sequences, arguments.length, arguments.hidden))
    several = islice(
        combinations(range(arguments.experts), arguments.experts // 4), arguments.subsets
    )
    subsets = torch.ones(arguments.subsets, arguments.experts, dtype=torch.bool)
    for row, gone in zip(subsets, several, strict=True):
        row[list(gone)] = False
    layer = mixture_of(group)
    every = [
        torch.stack([expert_outputs(layer, one, at) for at in range(layer.count)], dim=1)
        for one in tokens
    ]
    known = SubsetLosses.of(model, group, tokens)
    begin = time.perf_counter()
    slow = [added_up(model, group, tokens, every, kept, known.outputs) for kept in subsets]
    middle = time.perf_counter()
    quick = known.losses(subsets)
    end = time.perf_counter()
    rival, ours = (middle - begin) / len(subsets), (end - middle) / len(subsets)
    differ = float((quick - torch.tensor(slow, dtype=torch.float64)).abs().max() / quick.max())
    print(
        f"{arguments.experts} experts, {arguments.chosen} a token, hidden {arguments.hidden}, "
        f"{sum(map(len, tokens))} tokens: outputs added up {rival:.4f} s a subset, products "
        f"{ours:.4f} s, {rival / ours:.1f} times quicker; losses differ by {differ:.1g} of the "
        "largest"
    )


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"experts": 16, "chosen": 2, "hidden": 128, "inner": 64, "sequences": 32, "length": 256}
    for name, usual in {**sizes, "subsets": 16, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=usual)
    return parser.parse_args()


def mixture(arguments: argparse.Namespace) -> LanguageModel:
    """A random model of one block."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    sizes = {
        **{"num_experts": arguments.experts, "num_local_experts": arguments.experts},
        **{"num_experts_per_tok": arguments.chosen, "norm_topk_prob": True},
        **{"hidden_size": arguments.hidden, "moe_intermediate_size": arguments.inner},
        **{"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4},
        **{"head_dim": 8, "vocab_size": 64, "initializer_range": 0.2},
    }
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **sizes)).eval()
    # No text is read.
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    return wrap_model(network, PreTrainedTokenizerFast(tokenizer_object=words), name="qwen3_moe")


def added_up(
    model: LanguageModel,
    group: Group,
    tokens: list[Tensor],
    every: list[Tensor],
    kept: Tensor,
    wanted: list[Tensor],
) -> float:
    """The loss of one subset by outputs [tokens, experts, hidden] of each sequence."""
    total = 0.0
    with torch.no_grad(), narrowed(model, group, kept):
        for one, outputs, before in zip(tokens, every, wanted, strict=True):
            _, weights, indices = mixture_of(group).router(one)
            rows = torch.arange(len(one))[:, None]
            now = (weights.double()[..., None] * outputs[rows, indices].double()).sum(1)
            total += float((now - before).norm())
    return total


if __name__ == "__main__":
    main()
