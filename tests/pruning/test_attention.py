"""Each recipe of run time keeps the keys that its paper says, written as slow loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from prunezero.errors import PruneZeroError, RecipeError, StatisticsError
from prunezero.models.attending.continuing import (
    Continuations,
    dense_measures,
    read_densely,
    recall_windows,
)
from prunezero.models.attending.installing import Known, Session, installed
from prunezero.models.attending.interface import Call
from prunezero.models.attending.observing import (
    merged,
    next_attention,
    query_moments,
    reread_attention,
)
from prunezero.models.attending.remembering import bytes_held
from prunezero.models.loading.language_model import LanguageModel
from prunezero.pruning.attention import keeping, kept_row, policy_of
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe, published_of
from prunezero.pruning.recipes.staged import StagedRecipe
from prunezero.pruning.testbed import with_choices
from prunezero.searching.spaces.space import SearchSpace
from tests.tiny_attention import calls_of, sharp_model

PROMPT, MORE, KEPT = 40, 12, 0.5
SINKS, RECENT, WINDOW, POOL, LAG = 2, 4, 4, 3, 4
BUDGET = 20
# No token twice, whose keys in the first layer would be as long but for rounding.
IDS = torch.stack(
    [3 + torch.randperm(90, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
)[:, : PROMPT + MORE]
PUBLISHED = {recipe.name: recipe for recipe in published_of("kv_column")}
STEPPING = ("h2o", "tova")

Array = np.ndarray[Any, Any]


def small(recipe: Recipe, **numbers: Any) -> Recipe:
    """The recipe with numbers that fit a short prompt."""
    own = recipe.unit.options.model_dump(exclude_defaults=True)
    own |= {"sinks": SINKS, "recent": RECENT, "window": WINDOW, "pool": POOL, "lag": LAG}
    return with_choices(recipe, unit={"kv_column": {**own, **numbers}})


def recipe(**choices: object) -> Recipe:
    fields = {"name": "mine", "criterion": "ATT_W", "unit": "kv_column", "compare": "kv_head"}
    return validated(Recipe, {**fields, **choices}, "mine.yaml")


class Head:
    """What one key-value head and the query heads that read it see of a prompt, in float64."""

    def __init__(self, call: Call, twice: Call, head: int, writer: Array, known: Known) -> None:
        group = call.queries.shape[1] // call.keys.shape[1]
        self.q = call.queries[0, head * group : (head + 1) * group].double().numpy()
        self.k, self.v = (one[0, head].double().numpy() for one in (call.keys, call.values))
        self.scaling, self.n = call.scaling, len(self.k)
        # Of the prompt and its repetition.
        self.again = twice.queries[0, head * group : (head + 1) * group, self.n :].double().numpy()
        self.twice = twice.keys[0, head].double().numpy()
        width = self.k.shape[1]
        self.writers = [
            writer[:, one * width : (one + 1) * width]
            for one in range(head * group, (head + 1) * group)
        ]
        measured = known[call.layer]
        assert measured.query_mean is not None and measured.query_covariance is not None
        own = slice(head * group, (head + 1) * group)
        self.means = measured.query_mean[own].double().numpy()
        self.covariances = measured.query_covariance[own].double().numpy()
        assert measured.next_attention is not None
        self.following = measured.next_attention[head].double().numpy()

    def pays(self, i: int, j: int) -> float:
        """Attention of token i to token j, the mean over the query heads."""
        total = 0.0
        for q in self.q:
            logits = [math.exp(float(q[i] @ self.k[m]) * self.scaling) for m in range(i + 1)]
            total += logits[j] / sum(logits)
        return total / len(self.q)

    def received(self, j: int) -> list[float]:
        return [self.pays(i, j) for i in range(j, self.n)]

    def observed(self, j: int) -> float:
        """SnapKV's vote of the last queries, averaged over the neighbours before the window."""
        if j >= self.n - WINDOW:
            return sum(self.pays(i, j) for i in range(max(j, self.n - WINDOW), self.n)) / WINDOW
        near = [m for m in range(j - POOL // 2, j + POOL // 2 + 1) if 0 <= m < self.n - WINDOW]
        votes = [sum(self.pays(i, m) for i in range(self.n - WINDOW, self.n)) for m in near]
        return sum(votes) / WINDOW / POOL

    def read_again(self, j: int) -> float:
        """The most that a query of the repetition pays, by any head."""
        return max(
            float(np.exp(self.again[h, i] @ self.twice[j] * self.scaling))
            / sum(
                float(np.exp(self.again[h, i] @ self.twice[m] * self.scaling))
                for m in range(self.n + i + 1)
            )
            for h in range(len(self.again))
            for i in range(self.n)
        )

    def expected(self, j: int) -> float:
        total = 0.0
        for mean, covariance in zip(self.means, self.covariances, strict=True):
            logits = [
                k @ mean * self.scaling + k @ covariance @ k * self.scaling**2 / 2 for k in self.k
            ]
            weights = [math.exp(one - max(logits)) for one in logits]
            total += weights[j] / sum(weights)
        return total / len(self.means)

    def written(self, j: int) -> float:
        return float(np.mean([np.abs(writer @ self.v[j]).sum() for writer in self.writers]))

    def away(self, j: int) -> float:
        anchor = np.mean([k / np.linalg.norm(k) for k in self.k], 0)
        return -float(self.k[j] @ anchor / np.linalg.norm(self.k[j]) / np.linalg.norm(anchor))

    def lagged(self, states: Array, j: int) -> float:
        chunk = j // LAG
        if chunk >= self.n // LAG - 1:
            return 1.0
        after = states[(chunk + 1) * LAG : (chunk + 2) * LAG]
        low, high = after.min(0), after.max(0)
        spreads = [
            math.exp(((states[m] - low) / (high - low)).std(ddof=1))
            for m in range(chunk * LAG, (chunk + 1) * LAG)
        ]
        return spreads[j % LAG] / sum(spreads)


PAPERS: dict[str, Callable[[Head, int], float]] = {
    "window_sink": lambda head, j: float(j),
    "h2o": lambda head, j: sum(head.received(j)),
    "h2o_prompt": lambda head, j: sum(head.received(j)),
    "h2o_mean": lambda head, j: sum(head.received(j)) / len(head.received(j)),
    "snapkv": Head.observed,
    "tova": lambda head, j: head.pays(head.n - 1, j),
    "pyramidkv": Head.observed,
    "adakv": Head.observed,
    "knorm": lambda head, j: -float(np.linalg.norm(head.k[j])),
    "keydiff": Head.away,
    "value_norm": lambda head, j: float(np.linalg.norm(head.v[j])),
    "expected_attention": lambda head, j: (
        (head.expected(j) + 0.01) * float(np.linalg.norm(head.v[j]))
    ),
    "criticalkv": lambda head, j: (head.observed(j) + 0.0001) * head.written(j),
    "lagkv": lambda head, j: head.lagged(head.k, j) + head.lagged(head.v, j),
    "kvzip": Head.read_again,
    "attention_oracle": lambda head, j: float(head.following[j]),
}


def best(scores: list[float], count: int, sure: set[int]) -> set[int]:
    """So many keys, those that are sure among them, and of equals the later ones."""
    others = sorted(set(range(len(scores))) - sure, key=lambda j: (scores[j], j), reverse=True)
    return sure | set(others[: count - len(sure)])


def of_paper(name: str, heads: list[Head], layer: int) -> list[set[int]]:
    """Which keys each head of a layer keeps."""
    always = {*range(SINKS), *range(PROMPT - RECENT, PROMPT)}
    free = BUDGET - len(always)
    scores = [[PAPERS[name](head, j) for j in range(PROMPT)] for head in heads]
    if name == "tova":
        mean = [float(np.mean(column)) for column in zip(*scores, strict=True)]
        return [best(mean, BUDGET, always)] * len(heads)
    if name == "pyramidkv":
        # Two layers: the last keeps 1/20 of the mean, the first the rest.
        last = free / 20
        count = BUDGET + round(free - last) * (1 if layer == 0 else -1)
        return [best(one, count, always) for one in scores]
    if name == "criticalkv":
        first = [[head.observed(j) for j in range(PROMPT)] for head in heads]
        sure = [best(one, len(always) + free // 2, always) for one in first]
        return [best(one, BUDGET, own) for one, own in zip(scores, sure, strict=True)]
    if name == "adakv":
        kept = [best(one, len(always) + int(0.2 * free), always) for one in scores]
        every = [
            (scores[h][j], h, j)
            for h in range(len(heads))
            for j in range(PROMPT)
            if j not in kept[h]
        ]
        left = BUDGET * len(heads) - sum(map(len, kept))
        for _, h, j in sorted(every, reverse=True)[:left]:
            kept[h].add(j)
        return kept
    return [best(one, BUDGET, always) for one in scores]


def places_of(kept: Tensor, all_keys: Tensor) -> set[int]:
    """Which of all keys [keys, width] are kept [kept, width]."""
    return {int((all_keys == key).all(-1).nonzero()[0, 0]) for key in kept}


def known_of(model: LanguageModel) -> dict[int, Any]:
    before = merged(query_moments(model, IDS[1:], PROMPT), next_attention(model, IDS[0], PROMPT))
    return merged(before, reread_attention(model, IDS[0, :PROMPT]))


@pytest.mark.parametrize("name", sorted(PAPERS))
def test_a_recipe_keeps_the_keys_that_its_paper_says(name: str) -> None:
    model = sharp_model("llama", max_position_embeddings=2 * PROMPT)
    calls, known = calls_of(model, IDS[0, :PROMPT]), known_of(model)
    twice = calls_of(model, IDS[0, :PROMPT].repeat(2))
    policy = policy_of(small(PUBLISHED[name]), KEPT)
    found: dict[int, list[set[int]]] = {}
    with torch.no_grad(), installed(model, policy, known) as session:
        model.model(IDS[:1, :PROMPT], cache=session.cache)
        for layer, call in calls.items():
            if policy.together:
                rows = session.alive[layer][0]  # type: ignore[attr-defined]
                found[layer] = [set(row.nonzero()[:, 0].tolist()) for row in rows]
                continue
            pairs = zip(session.cache.layers[layer].keys[0], call.keys[0], strict=True)
            found[layer] = [places_of(*pair) for pair in pairs]
    for layer, call in calls.items():
        writer = model.model.model.layers[layer].self_attn.o_proj.weight.double().numpy()
        heads = [Head(call, twice[layer], head, writer, known) for head in range(2)]
        assert found[layer] == of_paper(name, heads, layer)
    sizes = [len(kept) for layer in found.values() for kept in layer]
    assert sum(sizes) == BUDGET * len(sizes)


def test_every_published_recipe_has_a_reference_or_is_random() -> None:
    assert {*PAPERS, "attention_random", "duo_heads"} == set(PUBLISHED)


def test_random_keys_are_others_for_another_seed_and_no_worse_placed() -> None:
    model = sharp_model("llama")
    found = []
    for seed in (0, 0, 1):
        chosen = small(PUBLISHED["attention_random"], seed=seed)
        with torch.no_grad(), keeping(model, chosen, KEPT) as cache:
            model.model(IDS[:1, :PROMPT], cache=cache)
            found.append(torch.stack([layer.keys for layer in cache.layers]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


class Stepping:
    """One key-value head whose keys go one by one, as H2O and TOVA say."""

    def __init__(self, sums: dict[int, float]) -> None:
        self.sums = sums

    def see(self, queries: Array, keys: dict[int, Array], scaling: float) -> dict[int, float]:
        """Attention that the newest token pays to those that are there, the mean of a group."""
        there = [*self.sums, max(self.sums) + 1]
        paid = dict.fromkeys(there, 0.0)
        for q in queries:
            logits = {j: math.exp(float(q @ keys[j]) * scaling) for j in there}
            for j in there:
                paid[j] += logits[j] / sum(logits.values()) / len(queries)
        return paid


@pytest.mark.parametrize("name", STEPPING)
def test_a_key_goes_at_each_step_as_the_paper_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sharp_model("llama")
    seen: list[Call] = []
    attend = Session.attend

    def noted(self: Session, call: Call) -> Any:
        seen.append(call)
        return attend(self, call)

    monkeypatch.setattr(Session, "attend", noted)
    policy = policy_of(small(PUBLISHED[name]), KEPT)
    kept: dict[int, list[list[list[int]]]] = {}
    with torch.no_grad(), installed(model, policy) as session:
        for part in (IDS[:1, :PROMPT], *torch.split(IDS[:1, PROMPT:], 1, 1)):
            model.model(part, cache=session.cache)
            for layer, (last,) in session.last.items():  # type: ignore[attr-defined]
                kept.setdefault(layer, []).append(last.positions.tolist())
    for layer, steps in kept.items():
        prompt, *later = [call for call in seen if call.layer == layer]
        heads = []
        for head in range(2):
            q, k = prompt.queries[0, 2 * head : 2 * head + 2].double().numpy(), prompt.keys[0, head]
            sums = dict.fromkeys(range(PROMPT), 0.0)
            for i in range(PROMPT):
                for one in q:
                    logits = (k.double().numpy()[: i + 1] @ one[i]) * prompt.scaling
                    weights = np.exp(logits - logits.max())
                    for j in range(i + 1):
                        sums[j] += float(weights[j] / weights.sum()) / len(q)
            heads.append(Stepping({j: sums[j] for j in steps[0][head]}))
        store = [dict(enumerate(prompt.keys[0, head].double().numpy())) for head in range(2)]
        for step, call in enumerate(later):
            new = PROMPT + step
            paid = []
            for head, one in enumerate(heads):
                store[head][new] = call.keys[0, head, -1].double().numpy()
                queries = call.queries[0, 2 * head : 2 * head + 2, 0].double().numpy()
                paid.append(one.see(queries, store[head], call.scaling))
                one.sums = {j: one.sums.get(j, 0.0) + paid[-1][j] for j in paid[-1]}
            for head, one in enumerate(heads):
                scores = one.sums
                if name == "tova":
                    scores = {j: (paid[0][j] + paid[1][j]) / 2 for j in paid[0]}
                free = sorted(scores)[SINKS : len(scores) - RECENT]
                gone = min(free, key=lambda j: (scores[j], j))
                del one.sums[gone]
                assert sorted(one.sums) == steps[step + 1][head], (layer, step, head)


def test_heavy_hitters_step_by_step_are_not_those_of_the_shortcut() -> None:
    model, found = sharp_model("llama"), {}
    for name in ("h2o", "h2o_prompt"):
        with torch.no_grad(), keeping(model, small(PUBLISHED[name]), KEPT) as cache:
            parts = (IDS[:1, :PROMPT], *torch.split(IDS[:1, PROMPT:], 1, 1))
            logits = torch.cat([model.model(part, cache=cache).logits for part in parts], 1)
            found[name] = logits, [layer.keys.shape[2] for layer in cache.layers]
    assert found["h2o"][1] == [BUDGET] * 2 and found["h2o_prompt"][1] == [BUDGET + MORE] * 2
    difference = (found["h2o"][0] - found["h2o_prompt"][0]).abs()[0].amax(-1)
    # What is asked first is answered from the same keys.
    assert float(difference[: PROMPT + 1].max()) < 1e-6 and float(difference[-1]) > 1e-3


def texts_of(model: LanguageModel) -> dict[str, Continuations]:
    again = recall_windows(IDS, prompt=PROMPT, repeated=MORE, language_model=model)
    return {
        "text": read_densely(model, IDS, prompt=PROMPT),
        "recall": read_densely(model, again, prompt=PROMPT, skipped=4),
    }


@pytest.mark.parametrize("name", ["snapkv", "adakv", "h2o", "attention_oracle", "kvzip"])
def test_a_row_is_measured_on_what_follows_a_prompt(name: str) -> None:
    model = sharp_model("llama", max_position_embeddings=2 * PROMPT)
    chosen = small(PUBLISHED[name])
    row = kept_row(model, chosen, KEPT, texts_of(model))
    again = recall_windows(IDS, prompt=PROMPT, repeated=MORE, language_model=model)
    for text, windows, begin in (("text", IDS, 0), ("recall", again, 3)):
        losses, distances = [], []
        for ids in windows:
            known = merged(
                next_attention(model, ids, PROMPT), reread_attention(model, ids[:PROMPT])
            )
            with torch.no_grad(), installed(model, policy_of(chosen, KEPT), known) as session:
                model.model(ids[None, :PROMPT], cache=session.cache)
                parts = torch.split(ids[None, PROMPT:], 1 if name in STEPPING else MORE, 1)
                found = torch.cat([model.model(p, cache=session.cache).logits for p in parts], 1)
            with torch.no_grad():
                dense = model.model(ids[None]).logits[0, PROMPT:].double().log_softmax(-1)
            logs = found[0].double().log_softmax(-1)
            places = range(begin, MORE - 1)
            losses += [-float(logs[t, ids[PROMPT + t + 1]]) for t in places]
            distances += [float((dense[t].exp() * (dense[t] - logs[t])).sum()) for t in places]
        assert row[f"{text}_perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
        assert row[f"{text}_kl"] == pytest.approx(np.mean(distances), rel=1e-3)
        assert len(row[f"{text}_window_losses"]) == len(IDS)
    # Two layers, keys and values, two heads of eight float32 channels.
    dense_bytes = 2 * 2 * 2 * 8 * 4 * PROMPT
    assert row["dense_kv_bytes"] == dense_bytes
    assert row["kv_bytes"] == (dense_bytes if name == "adakv" else dense_bytes // 2)
    assert row["simulated"] == (name != "snapkv")


@pytest.mark.parametrize("name", ["quest", "link_oracle"])
@pytest.mark.parametrize("when", ["following", "all"])
def test_links_are_measured_behind_the_same_prompts(name: str, when: str) -> None:
    model, published = sharp_model("llama"), Recipe.load(name)
    numbers = published.unit.options.model_dump(exclude_defaults=True)
    numbers |= {"sinks": SINKS, "recent": RECENT, "when": when}
    numbers |= {"page": 4} if name == "quest" else {}
    chosen = with_choices(published, unit={"link": numbers})
    row = kept_row(model, chosen, KEPT, {"text": read_densely(model, IDS, prompt=PROMPT)})
    losses = []
    for ids in IDS:
        with torch.no_grad(), installed(model, policy_of(chosen, KEPT)) as session:
            parts = [ids[None, :PROMPT], ids[None, PROMPT:]]
            logs = [model.model(p, cache=session.cache).logits[0].log_softmax(-1) for p in parts]
        losses += [-float(logs[1][t, ids[PROMPT + t + 1]]) for t in range(MORE - 1)]
    assert row["text_perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert row["simulated"] and row["kv_bytes"] == row["dense_kv_bytes"]
    # A page that is not full stays beside the budget, or the budget holds no whole page more.
    assert row["links"] == pytest.approx(KEPT, abs=0.1 if name == "quest" else 0.01)


def test_keeping_all_costs_nothing_and_prompts_are_read_once() -> None:
    model = sharp_model("llama")
    texts = texts_of(model)
    row = kept_row(model, small(PUBLISHED["snapkv"]), 1.0, texts)
    for name, text in texts.items():
        assert row[f"{name}_kl"] == 0 and row[f"{name}_top1_agreement"] == 1
        assert row[f"{name}_perplexity"] == dense_measures(model, text)["perplexity"]
    cache = DynamicCache(config=model.model.config)
    with torch.no_grad():
        model.model(IDS[:1, :PROMPT], cache=cache)
    assert row["kv_bytes"] == row["dense_kv_bytes"] == bytes_held(cache)


def test_recall_says_again_what_the_prompt_began_with() -> None:
    model = sharp_model("llama")
    again = recall_windows(IDS, prompt=PROMPT, repeated=MORE, language_model=model)
    assert torch.equal(again[:, :MORE], again[:, PROMPT:])
    assert torch.equal(again[0, MORE:PROMPT], IDS[1, MORE:PROMPT])
    assert torch.equal(again[-1, MORE:PROMPT], IDS[0, MORE:PROMPT])
    with pytest.raises(PruneZeroError, match="recall needs 2 windows or more"):
        recall_windows(IDS[:1], prompt=PROMPT, repeated=MORE, language_model=model)
    with pytest.raises(PruneZeroError, match="leave nothing to predict"):
        read_densely(model, IDS, prompt=PROMPT + MORE - 1)


def test_pruning_refuses_what_comes_and_goes_while_a_model_runs() -> None:
    model = sharp_model("llama")
    with pytest.raises(RecipeError, match="unit: kv_column: nothing is removed from the weights"):
        prune(model, PUBLISHED["snapkv"], 0.5)
    with pytest.raises(RecipeError, match="kv_column is left out while a model runs, so it is no"):
        body = {"unit": "kv_column", "criterion": "ATT_W", "compare": "kv_head"}
        stages = [body, {"recipe": "mask_fisher"}]
        validated(StagedRecipe, {"name": "mine", "stages": stages}, "mine.yaml")
    with pytest.raises(PruneZeroError, match="links are left out query by query"):
        validated(
            SearchSpace,
            {"name": "mine", "unit": "link", "terminals": ["QK"], "operators": ["mul"]},
            "mine.yaml",
        )
    with pytest.raises(RecipeError, match="a recipe of unit: kv_column or link is needed here"):
        policy_of(Recipe.load("wanda"), 0.5)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"criterion": "abs(W)"}, "feature W says nothing of query x key"),
        ({"criterion": "row_sum(KN)"}, "one value per scalar of query x key"),
        ({"compare": "row"}, "compare: row says nothing of unit: kv_column; known: kv_head, layer"),
        ({"unit": {"kv_column": {"pool": 4}}}, "an odd number of keys"),
        ({"unit": {"kv_column": {"first": "W"}}}, "feature W says nothing of query x key"),
        ({"unit": {"kv_column": {"first": "ATTW"}}}, "'ATTW' is not a known word"),
        ({"unit": {"kv_column": {"first": "KN", "block": 2}}}, "first and block are two ways"),
        ({"unit": {"kv_column": {"sink": 4}}}, "did you mean 'sinks'"),
        ({"recover": "lora"}, "recover: lora is for unit"),
        ({"criteria": {"q_proj": "KN"}}, "rank single weights"),
    ],
)
def test_a_recipe_of_run_time_is_held_to_its_table(choices: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(**choices)


def test_what_is_about_weights_alone_is_refused_and_what_is_missing_is_named() -> None:
    model = sharp_model("llama")
    with pytest.raises(RecipeError, match="recipe mine: statistics is about weights"):
        policy_of(recipe(statistics="sequential"), 0.5)
    with pytest.raises(PruneZeroError, match="compare: layer and block are two ways"):
        policy_of(recipe(compare="layer", unit={"kv_column": {"block": 4}}), 0.5)
    with pytest.raises(StatisticsError, match="has to be measured on calibration text"):
        kept_row(model, small(PUBLISHED["expected_attention"]), 0.5, texts_of(model))
    assert recipe(unit={"kv_column": {"first": "ATT_SUM"}}).signal == "full map"
