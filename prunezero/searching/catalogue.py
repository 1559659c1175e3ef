"""Which strategies can a search be run with? Evolution, and honest controls to compare it with."""

from __future__ import annotations

from prunezero.searching.controls import POPULATION, breed_plainly, suggest
from prunezero.searching.enumeration import enumerate_formulas
from prunezero.searching.strategies import Strategy, evolve, fresh, without_state

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
