"""History of a search: every rule, every mask, and the best on each rung."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import Any

import sympy

from prunezero.formula.criterion import Criterion
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.rule import Rule

# A result of each rung, cheapest first; candidates are ordered by one of them, never by two.
RUNGS = ("layer_error", "kl", "search_fitness", "validation_fitness")


class History:
    """Candidates by slot, by rule and by mask, and in order on each rung."""

    def __init__(self, *, forgets_masks: bool = False) -> None:
        """Begin with nothing.

        Args:
            forgets_masks: every proposal counts as new, to learn what the memory is worth.
        """
        self.slot = 0
        """of the next proposal"""
        self.new = 0
        """candidates with a mask of their own"""
        self._forgets_masks = forgets_masks
        self._latest: dict[int, Candidate] = {}
        self._rules: dict[str, int] = {}
        self._masks: dict[str, int] = {}
        self._ranked: dict[str, list[tuple[float, int]]] = {rung: [] for rung in RUNGS}

    @property
    def candidates(self) -> list[Candidate]:
        """All of them as they stand now, in order of slots."""
        return list(self._latest.values())

    def ranked(self, rung: str) -> list[Candidate]:
        """Those that reached a rung, best first."""
        return [self._latest[slot] for _, slot in self._ranked[rung]]

    def best_of_each(
        self, family: Callable[[Candidate], Hashable], *, island: tuple[int, int] = (0, 1)
    ) -> Iterator[Candidate]:
        """The best by layer error of every family, the best family first.

        Args:
            family: what those have in common of whom only the best counts.
            island: (which, of how many); a candidate lives on island slot modulo their number.
        """
        which, islands = island
        seen: set[Hashable] = set()
        for _, slot in self._ranked["layer_error"]:
            if slot % islands == which:
                candidate = self._latest[slot]
                own = family(candidate)
                if own not in seen:
                    seen.add(own)
                    yield candidate

    def population(
        self, size: int, *, island: tuple[int, int] = (0, 1), oldest: int = 0
    ) -> list[Candidate]:
        """The best by layer error, one of each skeleton: constants alone make no new formula.

        Args:
            island: see `best_of_each`.
            oldest: generation before which the best of a skeleton was found too long ago to be
                here; worse numbers that were tried since do not make the skeleton any younger.
        """
        best = self.best_of_each(lambda one: skeleton(one.criterion), island=island)
        return list(islice((one for one in best if one.generation >= oldest), size))

    def duplicate(self, rule: Rule, mask: str = "") -> Candidate | None:
        """A candidate of the same rule, or of the same mask and choices around it."""
        if self._forgets_masks:
            return None
        slot = self._rules.get(rule.text)
        if slot is None and mask:
            slot = self._masks.get(_mask_key(rule, mask))
        return None if slot is None else self._latest[slot]

    def keep(self, candidate: Candidate) -> Candidate:
        """Take in a candidate, or what has become of it on the next rung."""
        before = self._latest.get(candidate.slot)
        self._latest[candidate.slot] = candidate
        if before is None:
            self._rules.setdefault(candidate.rule.text, candidate.slot)
            if candidate.status == "new":
                self._masks.setdefault(_mask_key(candidate.rule, candidate.mask), candidate.slot)
                self.new += 1
        if candidate.status == "new":
            for rung in RUNGS:
                value = getattr(candidate, rung)
                if value is not None and (before is None or getattr(before, rung) is None):
                    insort(self._ranked[rung], (value, candidate.slot))
        return candidate

    def keep_known(self, candidate: Candidate, duplicate: Candidate) -> Candidate:
        """Take in a candidate that needs no work, since it does what another did."""
        return self.keep(
            replace(
                candidate, status="known", mask=duplicate.mask, layer_error=duplicate.layer_error
            )
        )


def _mask_key(rule: Rule, mask: str) -> str:
    return f"{mask}{beside_mask(rule)}"


def beside_mask(rule: Rule) -> list[tuple[str, str]]:
    """The choices of a rule that its mask does not show."""
    shown = ("compare", "criteria", "unit")
    return sorted((key, str(value)) for key, value in rule.choices.items() if key not in shown)


def skeleton(criterion: Criterion) -> str:
    """The formula with every number left open; equal for formulas that differ in numbers alone."""
    return _skeleton(criterion.sympy)


@lru_cache(maxsize=4096)
def _skeleton(node: Any) -> str:
    if isinstance(node, sympy.Rational):
        return "-c" if node.is_negative else "c"
    if not node.args:
        return str(node)
    parts = [_skeleton(argument) for argument in node.args]
    if isinstance(node, sympy.Pow) and parts[1] in ("c", "-c"):
        # An exponent of 1 is written as none.
        return parts[0] if parts[1] == "c" else f"1/{parts[0]}"
    if isinstance(node, sympy.Add | sympy.Mul):
        parts = sorted(part for part in parts if part != "c")
        if len(parts) == 1:
            return parts[0]
    return f"{type(node).__name__}({', '.join(parts)})"
