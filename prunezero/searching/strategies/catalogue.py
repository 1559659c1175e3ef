"""Catalogue of strategies that a search can be run with: evolution, and controls beside it.

Other packages add theirs under the entry point group `prunezero.strategies`: a name, and where a
`Strategy` is found. `contract.py` says whether one keeps its promises.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from prunezero.errors import SearchError, did_you_mean, reason
from prunezero.searching.strategies.controls import POPULATION, breed_plainly, suggest
from prunezero.searching.strategies.enumeration import enumerate_formulas
from prunezero.searching.strategies.evolution import Strategy, evolve, fresh, without_state

STRATEGIES: dict[str, Strategy] = {
    "evolution": Strategy(
        without_state(evolve), "breeds the best of every skeleton and kind, on islands"
    ),
    "random": Strategy(without_state(fresh), "fresh formulas only, through the same rungs"),
    "no-memory": Strategy(
        without_state(evolve), "evolution that pays for masks it has seen", forgets_masks=True
    ),
    "enumeration": Strategy(
        enumerate_formulas, "every formula of the space, shortest first", is_exhaustive=True
    ),
    "optuna": Strategy(suggest, "Optuna's TPE, which chooses the words by layer error"),
    "plain-gp": Strategy(
        without_state(breed_plainly),
        "genetic programming as Pruner-Zero published it; pays for every formula",
        is_screened=False,
        generation=POPULATION,
    ),
}

# Where other packages name their strategies.
GROUP = "prunezero.strategies"


def strategy_words() -> list[str]:
    """Every word that `find_strategy` knows."""
    return [*STRATEGIES, *(name for name in _others() if name not in STRATEGIES)]


def find_strategy(word: str) -> Strategy:
    """The strategy of that name, ours or another package's.

    Raises:
        SearchError: there is none (the message gives the nearest), or it cannot be loaded.
    """
    if word in STRATEGIES:
        return STRATEGIES[word]
    others = _others()
    if word not in others:
        known = strategy_words()
        near = did_you_mean(word, known) or "."
        raise SearchError(f"'{word}' is not a known strategy{near} Known: {', '.join(known)}.")
    try:
        found = others[word].load()
    except Exception as error:
        raise SearchError(
            f"strategy '{word}' of {others[word].value} fails: {reason(error)}"
        ) from error
    if not isinstance(found, Strategy):
        raise SearchError(
            f"strategy '{word}': {others[word].value} is a {type(found).__name__}, not a Strategy"
        )
    return found


def _others() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}
