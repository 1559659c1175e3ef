"""Whole heads of a model stream or keep all keys, as slow loops over calibration text say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from prunezero.errors import RecipeError, StatisticsError
from prunezero.models.attending.continuing import recall_windows
from prunezero.models.attending.installing import installed
from prunezero.models.attending.observing import streaming_errors
from prunezero.models.loading.language_model import LanguageModel
from prunezero.pruning.attention import kept_row, policy_of
from tests.pruning.test_attention import (
    BUDGET,
    IDS,
    KEPT,
    PROMPT,
    PUBLISHED,
    RECENT,
    SINKS,
    recipe,
    small,
)
from tests.tiny_attention import calls_of, sharp_model


def moved_by_streaming(model: LanguageModel, windows: Tensor) -> dict[tuple[int, int], float]:
    """How far each head's output moves, beside its size, by layer and key-value head."""
    sums: dict[tuple[int, int], list[float]] = {}
    for ids in windows:
        for layer, call in calls_of(model, ids).items():
            q, k, v = (one[0].double().numpy() for one in (call.queries, call.keys, call.values))
            for head, i in [(h, i) for h in range(len(q)) for i in range(PROMPT, len(ids))]:
                group = head * len(k) // len(q)
                far = [j for j in range(i + 1) if j >= SINKS and i - j >= RECENT]
                weights = np.exp(k[group, : i + 1] @ q[head, i] * call.scaling)
                near = weights.copy()
                near[far] = 0
                whole, stream = (w / w.sum() @ v[group, : i + 1] for w in (weights, near))
                total = sums.setdefault((layer, group), [0.0, 0.0])
                total[0] += float(((whole - stream) ** 2).sum())
                total[1] += float((whole**2).sum())
    return {place: distance / size for place, (distance, size) in sums.items()}


def test_heads_that_need_what_is_far_behind_keep_all_and_the_others_stream() -> None:
    model = sharp_model("llama")
    again = recall_windows(IDS[1:], prompt=PROMPT, repeated=8, language_model=model)
    known = streaming_errors(model, again, PROMPT, sinks=SINKS, recent=RECENT)
    worth = moved_by_streaming(model, again)
    for (layer, head), value in worth.items():
        error = known[layer].streaming_error
        assert error is not None and float(error[head]) == pytest.approx(value, rel=1e-4)
    always = {*range(SINKS), *range(PROMPT - RECENT, PROMPT)}
    # Four heads with 14 keys each to give away, and 34 that a whole head takes beside its six.
    assert len(worth) == 4 and 4 * (BUDGET - len(always)) // (PROMPT - len(always)) == 1
    policy = policy_of(small(PUBLISHED["duo_heads"]), KEPT)
    with torch.no_grad(), installed(model, policy, known) as session:
        model.model(IDS[:1, :PROMPT], cache=session.cache)
        for (layer, head), value in worth.items():
            row = session.alive[layer][0, head]  # type: ignore[attr-defined]
            wanted = set(range(PROMPT)) if value == max(worth.values()) else always
            assert set(row.nonzero()[:, 0].tolist()) == wanted
    with pytest.raises(StatisticsError, match="looks at .* which has to be measured"):
        kept_row(model, small(PUBLISHED["duo_heads"]), KEPT, {})


def test_whole_heads_are_chosen_by_what_is_known_before_a_prompt() -> None:
    heads = {"kv_column": {"spend": "heads"}}
    with pytest.raises(RecipeError, match="by STREAM alone, and ATT_W is of a prompt"):
        recipe(unit=heads, compare="model")
    for choices in ({"unit": heads}, {"compare": "model"}):
        with pytest.raises(RecipeError, match="compare: model and spend: heads belong together"):
            policy_of(recipe(criterion="STREAM", **choices), KEPT)
