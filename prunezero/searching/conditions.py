"""What does an answer of a judge depend on, beside the question?

Journals are refused, archived answers left aside and workers sent home where it differs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from prunezero.formula.code import steps
from prunezero.formula.vocabulary import OPERATORS
from prunezero.pruning.bench import Bench
from prunezero.searching.judging.samples import ROW_WEIGHTS, ladder_sums
from prunezero.searching.task import Task

# Counts changes to what a search draws, asks or writes; what is older is then refused.
FORMAT = 7


def conditions(bench: Bench, task: Task, also_benches: Sequence[Bench] = ()) -> dict[str, Any]:
    """Everything beside a question that its answer depends on, as JSON.

    Args:
        also_benches: of further models, on the same text and under the same settings.
    """
    space = task.space
    sums = ladder_sums(space.features, with_gradients=space.weighted_by_gradient)
    return {
        "prunezero": version("prunezero"),
        "torch": version("torch").split("+")[0],
        "sympy": version("sympy"),
        "optuna": version("optuna"),
        "model": bench.language_model.fingerprint,
        "dtype": str(bench.language_model.dtype),
        "device": bench.language_model.device.type,
        "text": bench.text.fingerprint,
        "settings": vars(bench.settings),
        "format": FORMAT,
        "sparsity": task.sparsity,
        "weighted_rows": ROW_WEIGHTS in sums,
        **_kernels(bench),
        **further(task),
        **further_models(also_benches),
        **_plugged(task),
    }


def further(task: Task) -> dict[str, Any]:
    """The words of further regimes and the number of draws, where there are several."""
    words = [regime.word for regime in task.also]
    draws = {"draws": task.draws} if task.draws > 1 else {}
    return {**({"also": words} if words else {}), **draws}


def further_models(also_benches: Sequence[Bench]) -> dict[str, list[str]]:
    """Fingerprints and dtypes of further models, where there are any."""
    if not also_benches:
        return {}
    models = [bench.language_model for bench in also_benches]
    return {
        "also_models": [model.fingerprint for model in models],
        "also_dtypes": [str(model.dtype) for model in models],
    }


def _kernels(bench: Bench) -> dict[str, str]:
    """Which Triton computes scores on a GPU; kernels and torch differ in last bits."""
    if bench.language_model.device.type == "cpu":
        return {}
    has_triton = importlib.util.find_spec("triton") is not None
    return {"triton": version("triton") if has_triton else "none"}


def _plugged(task: Task) -> dict[str, str]:
    """What operators of other packages mean that this search may use."""
    written = [*task.space.terminals, *(rule.criterion for rule in task.seeds)]
    inside = {step.operator.name for criterion in written for step in steps(criterion)}
    words = inside.union(task.space.operators) - set(OPERATORS.own)
    meanings = OPERATORS.plugged() if words else {}
    return {f"operator {word}": meanings[word] for word in sorted(words & set(meanings))}
