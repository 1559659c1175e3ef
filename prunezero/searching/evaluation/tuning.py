"""Tuning of a formula's numbers: Optuna looks for the best on a cheap rung.

Formulas that differ in numbers alone share a skeleton, and a search should meet a skeleton at its
best. One exponent stays as it is, since a power of the whole changes no mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prunezero.errors import CriterionError
from prunezero.formula.criterion import Criterion
from prunezero.searching.strategies.genetics import tunable

# A number is tried between these multiples of itself.
_LOWEST, _HIGHEST = 0.3, 2.5


def tune(
    criterion: Criterion,
    error: Callable[[Criterion], float | None],
    *,
    trials: int,
    seed: int,
) -> Criterion:
    """The formula with the numbers, of those tried, that make its error least; maybe its own.

    Args:
        error: of a formula, lower is better; None for one that fails.
        trials: errors to look at.
    """
    filled, values = tunable(criterion)
    if not values:
        return criterion
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=8)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    study.enqueue_trial({f"factor{place}": 1.0 for place in range(len(values))})

    def objective(trial: Any) -> float:
        factors = [
            trial.suggest_float(f"factor{place}", _LOWEST, _HIGHEST, log=True)
            for place in range(len(values))
        ]
        numbers = [factor * value for factor, value in zip(factors, values, strict=True)]
        found = _criterion(filled, numbers)
        lost = None if found is None else error(found)
        if found is None or lost is None:
            raise optuna.TrialPruned
        trial.set_user_attr("formula", found.text)
        return lost

    study.optimize(objective, n_trials=trials)
    done = [trial for trial in study.trials if "formula" in trial.user_attrs]
    best = min(done, key=lambda trial: (trial.value, trial.number), default=None)
    return criterion if best is None else Criterion.parse(best.user_attrs["formula"])


def _criterion(filled: Callable[[list[float]], Any], numbers: list[float]) -> Criterion | None:
    try:
        return Criterion.from_sympy(filled(numbers))
    except CriterionError:
        return None
