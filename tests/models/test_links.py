"""Each query keeps its own links: as plain loops choose them, and never by what comes later."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prunezero.errors import CriterionError, ModelError, RecipeError
from prunezero.formula.criterion import Criterion
from prunezero.formula.domains import DOMAINS
from prunezero.formula.features import FEATURES, features_of_domain
from prunezero.models.attending import links
from prunezero.models.attending.installing import installed
from prunezero.models.attending.links import LinkPolicy
from prunezero.models.attending.observing import Attended
from prunezero.models.loading.language_model import LanguageModel
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from tests.tiny_attention import sharp_model
from tests.tiny_models import tiny_batches

HEADS, GROUP, TOKENS, WIDTH, PAGE = 2, 2, 45, 8, 4
SINKS, RECENT = 2, 3
FORMULAS = ("ATT", "QK", "-DIST", "PAGE", "KN", "ATT * VN", "ATT * VON")

Array = np.ndarray[Any, Any]


def attended(seed: int = 0) -> Attended:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(HEADS * GROUP, TOKENS, WIDTH), *2 * [(HEADS, TOKENS, WIDTH)]]
    queries, keys, values = (torch.randn(*shape, generator=generator) for shape in shapes)
    writer = torch.randn(12, HEADS * GROUP * WIDTH, generator=generator)
    places = torch.arange(TOKENS).expand(HEADS, TOKENS)
    return Attended(0, queries, keys, values, places, 0.4, writer=writer)


def policy(text: str = "ATT", kept: float = 0.5, **numbers: Any) -> LinkPolicy:
    return LinkPolicy(Criterion.parse(text), kept, **{"sinks": SINKS, "recent": RECENT, **numbers})


def worth(text: str, one: Attended, head: int, i: int, j: int) -> float:
    q = one.queries[head, i].double().numpy()
    k, v = (of[head // GROUP].double().numpy() for of in (one.keys, one.values))
    logits = [0.4 * float(q @ k[m]) for m in range(i + 1)]
    weights = np.exp(np.array(logits) - max(logits))
    attention = float(weights[j] / weights.sum())
    if text == "PAGE":
        page = k[j // PAGE * PAGE : j // PAGE * PAGE + PAGE]
        return 0.4 * sum(
            max(q[c] * page[:, c].min(), q[c] * page[:, c].max()) for c in range(WIDTH)
        )
    return {
        "ATT": attention,
        "QK": logits[j],
        "-DIST": float(j - i),
        "KN": float(np.linalg.norm(k[j])),
        "ATT * VN": attention * float(np.linalg.norm(v[j])),
    }[text]


def kept_by(text: str, one: Attended, head: int, i: int, kept: float, page: int) -> set[int]:
    sees = set(range(i + 1))
    sure = {j for j in sees if j < SINKS or i - j < RECENT}
    if page > 1:
        pages = {j // page for j in sure}
        sure |= {j for j in sees if j // page in pages or j // page * page + page - 1 > i}
    count = int(i + 1 - (i + 1) * (1 - kept) // 1)
    free = max(count - len(sure), 0) // page * page
    ranked = sorted(sees - sure, key=lambda j: (worth(text, one, head, i, j), j), reverse=True)
    return sure | set(ranked[:free])


@pytest.mark.parametrize("kept", [0.25, 0.5])
@pytest.mark.parametrize("text", ["ATT", "QK", "-DIST", "PAGE", "KN", "ATT * VN"])
def test_a_query_keeps_its_best_links(
    text: str, kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several parts, the last of which is not full.
    monkeypatch.setattr(links, "CHUNK", 16)
    one, page = attended(), PAGE if text == "PAGE" else 1
    found = policy(text, kept, page=page).chosen(one)
    assert found.shape == (HEADS * GROUP, TOKENS, TOKENS)
    for head in range(HEADS * GROUP):
        for i in range(TOKENS):
            links_kept = set(found[head, i].nonzero()[:, 0].tolist())
            assert links_kept == kept_by(text, one, head, i, kept, page), (head, i)


def test_all_heads_of_a_layer_may_keep_the_same_links() -> None:
    one = attended(1)
    found = policy(share="layer").chosen(one)
    assert bool((found == found[:1]).all())
    for i in range(2 * (SINKS + RECENT) + 2, TOKENS):
        mean = [np.mean([worth("ATT", one, h, i, j) for h in range(4)]) for j in range(i + 1)]
        kept = set(found[0, i].nonzero()[:, 0].tolist())
        free = set(range(SINKS, i + 1 - RECENT))
        lowest = min(mean[j] for j in kept & free)
        assert all(mean[j] <= lowest for j in free - kept) and len(kept) == (i + 2) // 2


def blocks_kept(one: Attended, head: int, block: int, kept: float) -> set[int]:
    """Which blocks of keys a block of queries keeps, its own aside, as MInference chooses them."""
    q, k = one.queries[head].double().numpy(), one.keys[head // GROUP].double().numpy()
    first, end = block * PAGE, min(block * PAGE + PAGE, TOKENS)
    means = [k[at * PAGE : at * PAGE + PAGE].mean(0) for at in range(block)]
    scores = [float(q[first:end].mean(0) @ mean) * 0.4 for mean in means]
    sure = {at for at in range(block) if at * PAGE < SINKS or first - (at * PAGE + PAGE - 1) < 3}
    count = int(end - end * (1 - kept) // 1)
    free = max(count - len(sure) * PAGE - (end - first), 0) // PAGE
    ranked = sorted(set(range(block)) - sure, key=lambda at: (scores[at], at), reverse=True)
    return sure | set(ranked[:free])


@pytest.mark.parametrize("kept", [0.4, 0.6])
def test_the_queries_of_a_block_keep_the_same_blocks_of_a_prompt(
    kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Parts of queries that end inside a block.
    monkeypatch.setattr(links, "CHUNK", 10)
    one = attended(3)
    found = policy("BLOCK", kept, page=PAGE, at_prompt=True, behind=False).chosen(one)
    several = set()
    for head in range(HEADS * GROUP):
        for i in range(TOKENS):
            blocks = blocks_kept(one, head, i // PAGE, kept)
            wanted = {j for at in blocks for j in range(at * PAGE, at * PAGE + PAGE)}
            wanted |= set(range(i // PAGE * PAGE, i + 1))
            assert set(found[head, i].nonzero()[:, 0].tolist()) == wanted, (head, i)
        several.add(frozenset(blocks_kept(one, head, 10, kept)))
    assert len(several) > 1


def test_blocks_of_a_prompt_leave_what_follows_as_it_is_and_never_look_at_it() -> None:
    model, ids = sharp_model("llama"), tiny_batches(1, 40)
    chosen = policy("BLOCK", 0.4, page=PAGE, at_prompt=True, behind=False)
    with torch.no_grad(), installed(model, chosen) as session:
        before = model.model(ids[:, :32], cache=session.cache).logits
        prompt_links = session.links, session.links_kept
        after = model.model(ids[:, 32:], cache=session.cache).logits
        assert (session.links, session.links_kept) == prompt_links
        assert session.links == 2 * 4 * 32 * 33 // 2 and session.links_kept < session.links
    other = ids.clone()
    other[:, 36:] = (other[:, 36:] + 7) % 90 + 3
    again = read(model, chosen, other, 32, 8)
    assert torch.equal(again[:, :36], torch.cat([before, after], 1)[:, :36])
    steps = read(model, chosen, ids, 32, 1)
    assert float((steps - torch.cat([before, after], 1)).abs().max()) < 1e-5
    with torch.no_grad():
        dense = model.model(ids).logits
    assert float((dense - steps)[:, 32:].abs().max()) > 1e-3
    with pytest.raises(RecipeError, match="BLOCK is of all queries of a block, .* when: prompt"):
        fields = {"name": "mine", "criterion": "BLOCK", "unit": "link", "compare": "query"}
        validated(Recipe, fields, "mine.yaml")


def test_every_feature_of_links_is_tried_here() -> None:
    named = {name for text in FORMULAS for name in Criterion.parse(text).features}
    assert named | {"POS", "BLOCK"} == set(features_of_domain("link"))
    assert FEATURES["PAGE"].cost == "activations" and FEATURES["ATT"].cost == "full map"


def read(model: LanguageModel, chosen: LinkPolicy, ids: Tensor, prompt: int, step: int) -> Tensor:
    with torch.no_grad(), installed(model, chosen) as session:
        ends = [prompt, *range(prompt + step, ids.shape[1] + 1, step)]
        parts = [ids[:, begin:end] for begin, end in pairwise([0, *ends])]
        return torch.cat([model.model(part, cache=session.cache).logits for part in parts], 1)


@pytest.mark.parametrize("share", ["head", "layer"])
@pytest.mark.parametrize("text", FORMULAS)
def test_a_token_changes_no_link_before_it(text: str, share: str) -> None:
    model, ids = sharp_model("llama"), tiny_batches(1, 32)
    chosen = policy(text, 0.4, share=share, page=PAGE if text == "PAGE" else 1, at_prompt=True)
    before = read(model, chosen, ids, 32, 1)
    with torch.no_grad():
        assert float((before - model.model(ids).logits).abs().max()) > 1e-3
    for place in (9, 20, 31):
        other = ids.clone()
        other[:, place:] = (other[:, place:] + 7) % 90 + 3
        after = read(model, chosen, other, 32, 1)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place:], before[:, place:])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_links_are_the_same_whether_tokens_come_together_or_one_by_one(family: str) -> None:
    model, ids = sharp_model(family), tiny_batches(2, 32)
    for text in ("ATT", "PAGE"):
        page = PAGE if text == "PAGE" else 1
        whole = read(model, policy(text, page=page, at_prompt=True), ids, 32, 1)
        parts = read(model, policy(text, page=page, at_prompt=True), ids, 20, 1)
        assert float((whole - parts).abs().max()) < 1e-5
    with torch.no_grad():
        dense = model.model(ids).logits
    assert (
        float((read(model, policy(kept=1.0, at_prompt=True), ids, 20, 4) - dense).abs().max())
        < 1e-5
    )
    following = read(model, policy(kept=0.3), ids, 20, 4)
    assert float((following - dense)[:, :20].abs().max()) < 1e-5
    assert float((following - dense)[:, 20:].abs().max()) > 1e-3


def test_links_that_stay_are_counted() -> None:
    model, ids = sharp_model("llama"), tiny_batches(1, 32)
    with torch.no_grad(), installed(model, policy(kept=0.5)) as session:
        for part in (ids[:, :20], ids[:, 20:]):
            model.model(part, cache=session.cache)
    seen = range(21, 33)
    assert session.links == 2 * 4 * sum(seen)
    assert session.links_kept == 2 * 4 * sum((count + 1) // 2 for count in seen)


def test_a_formula_of_links_may_not_look_at_other_queries() -> None:
    for text in ("col_sum(ATT)", "ATT / row_max(ATT)", "zscore(QK)", "ATT - matrix_mean(ATT)"):
        with pytest.raises(CriterionError, match="looks at more of query x key than may be known"):
            DOMAINS["link"].refuse(Criterion.parse(text))
    DOMAINS["link"].refuse(Criterion.parse("ATT * VN - 0.1 * DIST"))
    model, ids = sharp_model("llama"), tiny_batches(2, 32)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with (
        pytest.raises(ModelError, match="a padded batch has texts of unequal length"),
        installed(model, policy()) as session,
    ):
        model.model(ids, attention_mask=mask, cache=session.cache)
