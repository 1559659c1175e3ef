"""Thousands of formulas and formulas like monsters: caches, memory and time stay bounded."""

from __future__ import annotations

import gc
import random
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sympy
import torch

from prunezero.errors import CriterionError
from prunezero.formula import Criterion
from prunezero.formula.ranking import ranking_form
from prunezero.formula.reading import MAX_DEPTH
from prunezero.scoring import score
from prunezero.searching import history as history_module
from prunezero.searching.evaluation.evaluator import Evaluator
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.history import RUNGS, History
from prunezero.searching.search import search
from prunezero.searching.session import open_session
from tests.searching.test_faults import candidate
from tests.searching.testbed import make_task, tiny_space, tiny_testbed

MANY = 5000
# Python calls, about half a second: five times what the largest formula below takes.
AT_ONCE = 1_000_000


def many() -> Iterator[Criterion]:
    """Formulas that all differ, made without the reader's time."""
    W, X = (Criterion.parse(name).sympy for name in ("abs(W)", "X"))
    for place in range(1, MANY + 1):
        share = sympy.Rational(place, MANY + 1)
        yield Criterion(sympy.Add(W, sympy.Mul(share, X)), f"{place}/{MANY + 1}*X + abs(W)")


def test_five_thousand_formulas_leave_caches_of_bounded_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluator = Evaluator(make_task(tiny_space(), 0.5), [tiny_testbed()])
    mask = torch.ones(2, 8, dtype=torch.bool)
    monkeypatch.setattr(
        "prunezero.searching.proxies.layer_error.masks_on", lambda *args, **scores: [mask]
    )
    for criterion in many():
        evaluator.probe(Rule(criterion))
        score._compiled(criterion)
        history_module.skeleton(criterion)
    for cache in (evaluator.probe, score._compiled, history_module._skeleton):
        known = cache.cache_info()
        assert known.maxsize is not None and known.currsize <= known.maxsize <= 4096


def held_by(root: object) -> tuple[int, set[type]]:
    """Bytes and kinds of everything that an object keeps alive, beside code."""
    code = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
    seen: set[int] = set()
    waiting, size, kinds = [root], 0, set()
    while waiting:
        one = waiting.pop()
        if id(one) not in seen and not isinstance(one, code):
            seen.add(id(one))
            size += sys.getsizeof(one)
            kinds.add(type(one))
            waiting.extend(gc.get_referents(one))
    return size, kinds


def test_a_memory_of_five_thousand_candidates_holds_no_tensor_and_few_megabytes() -> None:
    history = History()
    for slot, criterion in enumerate(many()):
        values = {one.replace("fitness", "perplexity"): 1.0 + slot for one in RUNGS}
        history.keep(replace(candidate(slot, "abs(W)", **values), criterion=criterion))
    size, kinds = held_by(history)
    assert {Candidate, Criterion} <= kinds
    assert not any(issubclass(kind, torch.Tensor | np.ndarray) for kind in kinds)
    assert size < 20e6


def test_candidates_of_a_search_hold_no_tensor(tmp_path: Path) -> None:
    session = open_session([tiny_testbed()], make_task(tiny_space(tuned=0), 0.5), tmp_path / "run")
    _, kinds = held_by(list(search(session.rungs, max_candidates=12)))
    session.journal.close()
    assert Candidate in kinds
    assert not any(issubclass(kind, torch.Tensor | np.ndarray) for kind in kinds)


# All that simplification could multiply out, nest or fold, as large as the reader takes it.
MONSTERS = (
    "*".join(["(abs(W)+X)"] * 8) + "/(" + "*".join(["(X+G)"] * 8) + ")",
    "(abs(W)+X+G+1)**8*(abs(W)-X)**8/(abs(W)+2*X+3)**8*(W-G)**7/(W+X+2)**6",
    "(((((((abs(W)+X)**8+X)**8+G)**8+X)**8+1)**8+R1)**8+C1)**8",
    "tanh(" * 14 + "W*X" + ")" * 14,
    "log(" * 7 + "W*X" + ")" * 7,
    "sqrt(" * 14 + "W*X" + ")" * 14,
    "+".join(f"abs(W)/(X+0.{place})" for place in range(11, 22)),
    "".join(f"(abs(W)+{place}.37*X)*" for place in range(1, 11)) + "exp(W)",
    "abs(W)" + "+X/(1+abs(W)" * 6 + "+G" + ")" * 6,
    "zscore(minmax(row_sum(exp(W*X)*col_mean(abs(W)**1.37/X))*tanh(log(abs(W)+X**7.9))))",
)


def drawn(rng: random.Random, words: int, depth: int) -> str:
    """A formula of about so many words, nested at most so deep."""
    if words < 2 or depth < 2:
        return rng.choice(["W", "X", "G", "R1", "C1", "0.3", "1.7"])
    kind = rng.random()
    if kind < 0.5:
        left = rng.randint(1, words - 1)
        one, other = drawn(rng, left, depth - 1), drawn(rng, words - left - 1, depth - 1)
        return f"({one} {rng.choice('+-*/')} {other})"
    inside = drawn(rng, words - 2, depth - 1)
    if kind < 0.7:
        return f"({inside})**{rng.choice([2, 8, 0.5, -1, 1.3])}"
    return f"{rng.choice(['abs', 'sqrt', 'log', 'exp', 'tanh', 'minmax', 'row_sum'])}({inside})"


@contextmanager
def python_calls() -> Iterator[list[int]]:
    """Counts, in its one item, calls of Python functions inside.

    Unlike seconds, they do not depend on the machine nor on what else lies in its memory.
    """
    count = [0]

    def called(frame: types.FrameType, event: str, argument: object) -> None:
        count[0] += event == "call"

    sys.setprofile(called)
    try:
        yield count
    finally:
        sys.setprofile(None)


def calls_to_rank(text: str) -> tuple[int, int]:
    """Python calls for all that a search does to a formula; its words, 0 if it is refused."""
    words = 0
    with python_calls() as count, suppress(CriterionError):
        criterion = Criterion.parse(text)
        for compare in ("row", "layer", "model"):
            ranking_form(criterion.sympy, compare)
        history_module.skeleton(criterion)
        words = criterion.complexity
    return count[0], words


@pytest.mark.parametrize("text", MONSTERS)
def test_a_formula_made_to_stall_simplification_is_ranked_at_once(text: str) -> None:
    calls, words = calls_to_rank(text)
    assert words
    assert calls < AT_ONCE


@pytest.mark.filterwarnings("ignore::prunezero.errors.FormulaWarning")
def test_drawn_formulas_of_the_largest_size_are_ranked_or_refused_at_once() -> None:
    rng = random.Random(0)
    found = [calls_to_rank(drawn(rng, size, MAX_DEPTH)) for size in (40, 60, 80) * 12]
    assert max(calls for calls, _ in found) < AT_ONCE
    assert max(words for _, words in found) > 50


def test_a_rule_is_found_again_among_thousands_without_looking_at_them() -> None:
    history = History()
    for slot, criterion in enumerate(many()):
        history.keep(replace(candidate(slot, "abs(W)"), criterion=criterion))
    wanted = Rule(history.candidates[-1].criterion)
    with python_calls() as count:
        assert history.duplicate(wanted) is not None
    assert count[0] < 100
