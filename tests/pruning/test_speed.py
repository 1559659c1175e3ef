"""Speed is measured in turns, on a model that is the same afterwards; no time is tested here."""

from __future__ import annotations

import subprocess
import sys

import torch

from prunezero.models.anatomy.linears import find_linears
from prunezero.models.editing.selection import Selection
from prunezero.pruning.costs import costs_without, model_costs
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.speed import speed_beside
from tests.models.test_mlp import noisy
from tests.tiny_models import tiny_batches, tiny_model


def test_both_take_turns_and_the_model_is_what_it_was() -> None:
    model = noisy(tiny_model("llama"))
    groups = UNITS["width"].groups(find_linears(model.model), model)
    kept = [torch.arange(group.units) % 2 == 0 for group in groups]
    selection = Selection(tuple(groups), tuple(kept))
    ids = tiny_batches(1, 12)
    before = model.model(ids).logits
    for speed in speed_beside(model, selection, ids, turns=2):
        assert speed.read > 0 and speed.written > 0
    assert torch.equal(model.model(ids).logits, before)


def test_what_units_cost_is_what_is_missing_from_the_smaller_model() -> None:
    for layout in ("llama", "gpt2", "phi3", "gpt_neox"):
        model = noisy(tiny_model(layout))
        groups = UNITS["width"].groups(find_linears(model.model), model)
        # One head more stays in the second block, so layers differ.
        kept = [torch.arange(group.units) >= 1 + group.block % 2 for group in groups]
        kept = [
            one if int(one.sum()) >= group.least else torch.arange(group.units) >= 1
            for one, group in zip(kept, groups, strict=True)
        ]
        selection = Selection(tuple(groups), tuple(kept))
        ids = tiny_batches(1, 8)
        dense, smaller = model_costs(model, ids), costs_without(model, selection, ids)
        assert dense.parameters - smaller.parameters == selection.removed("parameters")
        assert dense.kv_bytes - smaller.kv_bytes == sum(
            group.cost["kv bytes"] * int((~one).sum())
            for group, one in selection
            if group.kind == "kv_group"
        )
        assert smaller.flops < dense.flops


def test_counting_leaves_triton_alone_until_it_counts() -> None:
    """Whoever imports Triton first settles whether it interprets its kernels."""
    line = "import sys, prunezero.pruning.compare; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line]).returncode == 0
