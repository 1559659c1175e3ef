"""A search for criteria of keys: the same under a seed and after a cut; its front is recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunezero.errors import PruneZeroWarning, SearchError
from prunezero.models.attending.continuing import read_densely, recall_windows
from prunezero.models.attending.observing import next_attention, query_moments
from prunezero.models.loading.language_model import LanguageModel
from prunezero.pruning.attention import kept_row
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.searching.attending.finalists import front_recipes, table, validated_rows
from prunezero.searching.attending.front import dominates
from prunezero.searching.attending.results import Results
from prunezero.searching.attending.rungs import Rungs, Texts, spread
from prunezero.searching.attending.search import Experiment, Found, Tried, search_attention
from prunezero.searching.evaluation.journal import Journal
from prunezero.searching.spaces.space import SearchSpace
from tests.tiny_attention import calls_of, sharp_model
from tests.tiny_models import VOCABULARY

PROMPT, FOLLOWING, REPEATED = 80, 12, 10
KEPT = 0.6
# Too much of what always stays would leave small prompts no choice.
NUMBERS = {"recent": 8, "sinks": 2, "window": 8}


def small_space(**changes: Any) -> SearchSpace:
    """The cheap space with numbers for prompts of 80 tokens, in small generations."""
    units = [{"kv_column": {**NUMBERS, **more}} for more in ({}, {"pool": 1}, {"share": "layer"})]
    fields = SearchSpace.load("attention").model_dump(mode="json")
    fields |= {"choices": {"compare": ["kv_head", "layer"], "unit": units}}
    fields |= {"generation": 6, "measured": 3, "population": 6}
    return validated(SearchSpace, fields | changes, "small.yaml")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return sharp_model(max_position_embeddings=192)


def texts_of(model: LanguageModel, seed: int, count: int = 2) -> Texts:
    rng = torch.Generator().manual_seed(seed)
    windows = torch.randint(2, VOCABULARY, (count, PROMPT + FOLLOWING), generator=rng)
    again = recall_windows(windows, prompt=PROMPT, repeated=REPEATED, language_model=model)
    return {
        "text": read_densely(model, windows, prompt=PROMPT),
        "recall": read_densely(model, again, prompt=PROMPT, skipped=2),
    }


@pytest.fixture(scope="module")
def texts(model: LanguageModel) -> Texts:
    return texts_of(model, 0)


@pytest.fixture(scope="module")
def known(model: LanguageModel) -> Any:
    rng = torch.Generator().manual_seed(9)
    windows = torch.randint(2, VOCABULARY, (2, PROMPT + FOLLOWING), generator=rng)
    return query_moments(model, windows, PROMPT)


def experiment(candidates: int | None = 16, **changes: Any) -> Experiment:
    fields: dict[str, Any] = {"space": small_space(), "kept": KEPT, "candidates": candidates}
    return Experiment(**fields | changes)


@pytest.fixture(scope="module")
def found(model: LanguageModel, texts: Texts, known: Any) -> Found:
    return search_attention(model, texts, experiment(), known=known)


def told(found: Found) -> list[dict[str, Any]]:
    return [vars(one) for one in found.tried]


def test_the_cheap_rung_is_the_attention_that_goes_to_keys_that_went(
    model: LanguageModel, texts: Texts
) -> None:
    fields = {"name": "first", "criterion": "-POS", "unit": {"kv_column": NUMBERS}}
    recipe = validated(Recipe, {**fields, "compare": "kv_head"}, "recipe")
    rungs = Rungs(model, texts, {}, layers=2)
    rungs.prepare(recipe.features)
    count = round(PROMPT * KEPT)
    # The first keys stay, and the last 8.
    stays = [*range(count - 8), *range(PROMPT - 8, PROMPT)]
    for name, text in texts.items():
        shares = []
        for reading in text.readings:
            for layer, measured in next_attention(model, reading.ids, PROMPT).items():
                call = calls_of(model, reading.ids)[layer]
                queries, keys = call.queries[0].double().numpy(), call.keys[0].double().numpy()
                group = len(queries) // len(keys)
                for head in range(len(keys)):
                    total = np.zeros(PROMPT)
                    for query in range(head * group, (head + 1) * group):
                        for place in range(PROMPT, len(reading.ids)):
                            seen = keys[head, : place + 1] @ queries[query, place] * call.scaling
                            weights = np.exp(seen - seen.max())
                            total += (weights / weights.sum())[:PROMPT] / group
                    assert measured.next_attention is not None
                    assert np.allclose(total, measured.next_attention[head], atol=1e-4)
                    shares.append(1 - total[stays].sum() / total.sum())
        assert rungs.screened(recipe, KEPT)["lost"][name] == pytest.approx(
            np.mean(shares), abs=1e-5
        )


def test_the_dear_rung_is_the_kl_that_a_comparison_measures(
    model: LanguageModel, texts: Texts, found: Found
) -> None:
    best = next(one for one in found.front if "EXPECTED" not in one.recipe.features)
    row = kept_row(model, best.recipe, KEPT, texts)
    assert best.kl == {name: row[f"{name}_kl"] for name in texts}


def test_a_search_measures_what_it_may_and_keeps_what_nobody_dominates(found: Found) -> None:
    assert len(found.measured) == 16
    assert {one.origin for one in found.measured} > {"seed"}
    assert len({one.mask for one in found.tried}) == len(found.tried)
    front = found.front
    for one in found.measured:
        beaten = any(
            dominates(tuple(other.kl.values()), tuple(one.kl.values())) for other in found.measured
        )
        assert (one in front) == (not beaten)
    for text in ("text", "recall"):
        assert -1 <= found.rung_tau(text) <= 1


def test_the_same_seed_gives_the_same_recipes_and_another_one_others(
    model: LanguageModel, texts: Texts, known: Any, found: Found
) -> None:
    assert told(search_attention(model, texts, experiment(), known=known)) == told(found)
    other = search_attention(model, texts, experiment(seed=1), known=known)
    assert told(other) != told(found)


def test_a_search_that_was_cut_ends_where_the_whole_one_does(
    model: LanguageModel, texts: Texts, known: Any, found: Found, tmp_path: Path
) -> None:
    path = tmp_path / "journal.jsonl"

    class CutError(Exception):
        pass

    seen: list[Tried] = []

    def cut(tried: Tried) -> None:
        seen.append(tried)
        if len(seen) == 23:
            raise CutError

    def searched(**told: Any) -> Found:
        journal = Journal(path, {"format": 0}, resume=path.exists())
        try:
            results = Results(journal)
            return search_attention(
                model, texts, experiment(), known=known, results=results, **told
            )
        finally:
            journal.close()

    with pytest.raises(CutError):
        searched(told=cut)
    # A crash may leave a part of a line.
    whole = path.read_bytes()
    path.write_bytes(whole + b"0badc0de 99 {")
    assert told(searched()) == told(found)
    assert path.read_bytes().startswith(whole)
    size = path.stat().st_size
    searched()
    assert path.stat().st_size == size
    path.write_bytes(path.read_bytes().replace(b'"measured"', b'"meazured"', 1))
    with pytest.warns(PruneZeroWarning, match=r"line \d+: damaged; .* computed again"):
        assert told(searched()) == told(found)


def test_a_search_ends_when_it_is_told_to_and_from_scratch_no_recipe_is_published(
    model: LanguageModel, texts: Texts, known: Any
) -> None:
    seen: list[Tried] = []
    asked = experiment(candidates=None, from_scratch=True)
    found = search_attention(
        *(model, texts, asked), known=known, told=seen.append, stop=lambda: len(seen) >= 9
    )
    assert len(seen) == 9 and not {"seed"} & {one.origin for one in found.tried}


def test_recipes_of_the_front_are_files_that_load_and_stand_beside_their_rivals(
    model: LanguageModel, known: Any, found: Found, tmp_path: Path
) -> None:
    recipes = front_recipes(found, experiment(), "mine")
    assert recipes
    for recipe in recipes:
        path = tmp_path / f"{recipe.name}.yaml"
        recipe.save(path)
        assert Recipe.load(path) == recipe
    other, kept = texts_of(model, 5), experiment()
    rows = validated_rows(model, recipes, other, kept, known=known)
    names = [row["recipe"] for row in rows]
    assert {"snapkv", "keydiff", "adakv", "tova", *(one.name for one in recipes)} <= set(names)
    # Those of costlier signals are no rivals here.
    assert not {"h2o_mean", "kvzip", "attention_oracle"} & set(names)
    points = {row["recipe"]: (row["text_kl"], row["recall_kl"]) for row in rows if "rank" in row}
    for row in rows:
        if "rank" in row:
            beaten = any(dominates(one, points[row["recipe"]]) for one in points.values())
            assert (row["rank"] == 0) == (not beaten)
    lines = table(rows, list(other))
    assert len(lines) == len(rows) + 2 and all(line.count(" | ") >= 6 for line in lines)
    assert f"**{recipes[0].name}**" in "\n".join(lines)


def test_a_cheap_search_starts_from_no_recipe_that_looks_at_more(
    model: LanguageModel, texts: Texts, known: Any
) -> None:
    for name, complaint in {
        "h2o_mean": "h2o_mean cannot start .* it looks at 'full map', and the space allows 'activ",
        "attention_oracle": "it looks at 'oracle'",
        "tova": "its keys go at each step",
        "wanda": "it is of unit: weight",
    }.items():
        with pytest.raises(SearchError, match=complaint):
            start = (Recipe.load(name),)
            search_attention(model, texts, experiment(start=start), known=known)
    with pytest.raises(SearchError, match="space tiny is of unit: weight"):
        search_attention(model, texts, experiment(space=SearchSpace.load("tiny")), known=known)
    with pytest.raises(SearchError, match="looks at EXPECTED, so how queries are distributed"):
        search_attention(model, texts, experiment())


def test_layers_are_sampled_over_the_whole_depth() -> None:
    assert spread(30, 4) == [3, 11, 18, 26]
    assert spread(2, 4) == [0, 1] and spread(5, 1) == [2]
