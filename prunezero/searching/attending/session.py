"""Session of a search for criteria of keys: an experiment on its model, and what it remembers.

The experiment is a `SearchConfig` like that of every search, so `search.json` and the journal of a
run folder are read the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prunezero.models.attending.installing import Known
from prunezero.pruning.attention import policy_of
from prunezero.pruning.key_rows import kept_share
from prunezero.pruning.prompts import coming_queries, known_of, texts_of
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.testbed import Testbed
from prunezero.searching.attending.finalists import front_recipes, validated_rows
from prunezero.searching.attending.proposals import key_of, published_within
from prunezero.searching.attending.results import Results
from prunezero.searching.attending.search import (
    Experiment,
    Found,
    Tried,
    looked_at,
    search_attention,
)
from prunezero.searching.evaluation.journal import Journal
from prunezero.searching.experiment.config import SearchConfig
from prunezero.searching.experiment.provenance import surroundings

# Counts changes to what such a search draws, measures or writes; what is older is then refused.
FORMAT = "attention 2"
# Layers that the cheap rung looks at.
LAYERS = 6

Row = dict[str, Any]


@dataclass(frozen=True)
class AttentionSession:
    """A search for criteria of keys that is ready to run."""

    testbed: Testbed
    """its model and text"""
    config: SearchConfig
    """what was asked for"""
    journal: Journal
    """what it remembers"""

    @cached_property
    def known(self) -> Known:
        """What calibration text says of queries to come, where a recipe may look at it."""
        features = looked_at(experiment_of(self.config, None))
        return coming_queries(self.testbed) if "EXPECTED" in features else {}

    def searched(
        self,
        candidates: int | None,
        told: Callable[[Tried], None] = lambda tried: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Found:
        """What is found on search text; arguments as of `search_attention`.

        Args:
            candidates: recipes whose KL is measured; None goes on until `stop`.
        """
        return search_attention(
            self.testbed.language_model,
            texts_of(self.testbed, "search"),
            experiment_of(self.config, candidates),
            known=self.known,
            results=Results(self.journal),
            told=told,
            stop=stop,
        )

    def front(self, found: Found, name: str) -> list[Recipe]:
        """The recipes of the front that the search named so has made."""
        return front_recipes(found, experiment_of(self.config, None), name)

    def validated(self, recipes: list[Recipe]) -> list[Row]:
        """Rows of these recipes and of published ones on validation text, as `validated_rows`."""
        return validated_rows(
            self.testbed.language_model,
            recipes,
            texts_of(self.testbed, "validation"),
            experiment_of(self.config, None),
            known=self._known_of_rivals(),
            results=Results(self.journal),
        )

    def _known_of_rivals(self) -> Known:
        """What published recipes look at too, on calibration text."""
        kept, known = kept_share(self.config.sparsity), self.known
        for recipe in published_within(self.config.space_content):
            if "STREAM" in recipe.features:
                known = known_of(self.testbed, policy_of(recipe, kept), known)
        return known


def experiment_of(config: SearchConfig, candidates: int | None) -> Experiment:
    """What a configuration asks to be searched.

    Raises:
        SelectionError: the share of keys is missing.
        RecipeError: what it is to start from is no recipe of keys.
    """
    start = [
        validated(Recipe, {"name": f"start-{place}", "criterion": one.formula, **one.choices}, "")
        for place, one in enumerate(config.start, start=1)
    ]
    return Experiment(
        config.space_content,
        kept_share(config.sparsity),
        candidates,
        config.seed,
        LAYERS,
        tuple(start),
        config.from_scratch,
    )


def open_session(
    testbed: Testbed,
    config: SearchConfig,
    folder: Path,
    *,
    resume: bool = False,
    opened: Callable[[], None] = lambda: None,
) -> AttentionSession:
    """Open the journal `folder/journal.jsonl` of a search on a model and text.

    Args:
        config: with nothing left to the machine, see `SearchConfig.settled`.
        opened: called once the journal is this search's.

    Raises:
        SearchError: the journal is in use, or belongs to a search under other settings.
        SelectionError: the share of keys is missing.
    """
    header = header_of(testbed, config)
    journal = Journal(folder / "journal.jsonl", header, resume=resume)
    try:
        opened()
    except BaseException:
        journal.give_up()
        raise
    return AttentionSession(testbed, config, journal)


def header_of(testbed: Testbed, config: SearchConfig) -> dict[str, Any]:
    """What heads the journal of a search: its experiment, and fingerprints beside it, as JSON."""
    start = [key_of(one) for one in experiment_of(config, None).start]
    written = {"format": FORMAT, "layers": LAYERS, "seeds": start}
    if config.from_scratch:
        written["from scratch"] = True
    return {
        "config": config.model_dump(mode="json"),
        "fingerprints": surroundings(testbed) | written,
    }
