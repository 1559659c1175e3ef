"""Domain: the table that a formula is a formula of, and what its value may look like there.

A formula always sees a table of rows and columns. What they are differs: outputs and inputs of a
weight matrix; units that may go and the weights of each; queries and keys. A domain says so, and
with it which value ranks anything: where one row per unit is to be ranked, a value per entry is too
much, and where the entries of a row compete, a value per row is too little.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

from prunezero.errors import CriterionError
from prunezero.formula.criterion import Criterion
from prunezero.formula.features import FEATURES
from prunezero.formula.functions import AXES, MINMAX, REDUCTIONS, ZSCORE, MatrixFunction


@dataclass(frozen=True)
class Domain:
    """One kind of table that formulas are computed on."""

    name: str
    axes: tuple[str, str]
    """what a row and what a column of the table is"""
    shapes: tuple[str, ...]
    """shapes that the value of a formula may have; it is repeated along an axis that it lacks"""
    reductions: frozenset[str]
    """words of a formula that may look at more than one entry of the table"""
    is_run_time: bool
    """whether the table is another for every text, and filled while the model runs"""

    def refuse(self, criterion: Criterion) -> None:
        """Refuse a formula that says nothing here.

        Raises:
            CriterionError: a feature is of another domain, the value has another shape, or a word
                looks at what it may not.
        """
        self.refuse_words(criterion)
        if criterion.shape not in self.shapes:
            raise CriterionError(
                f"criterion {criterion.text} gives one value per {criterion.shape} of "
                f"{' x '.join(self.axes)}, but one per {' or '.join(self.shapes)} is needed; "
                "reduce it, or use other features"
            )

    def takes(self, criterion: Criterion) -> bool:
        """Whether a formula says something here."""
        with suppress(CriterionError):
            self.refuse(criterion)
            return True
        return False

    def refuse_words(self, criterion: Criterion) -> None:
        """Refuse a part of a formula, of any shape, that says nothing here.

        Raises:
            CriterionError: a feature is of another domain, or a word looks at what it may not.
        """
        for name in criterion.features:
            if self.name not in FEATURES[name].domains:
                raise CriterionError(
                    f"criterion {criterion.text}: feature {name} says nothing of "
                    f"{' x '.join(self.axes)}; see `prunezero list features`"
                )
        words = {type(node).__name__ for node in criterion.sympy.atoms(MatrixFunction)}
        for word in sorted(words - self.reductions):
            raise CriterionError(
                f"criterion {criterion.text}: {word} looks at more of {' x '.join(self.axes)} than "
                f"may be known; use {', '.join(sorted(self.reductions)) or 'no such word'}"
            )

    def ranks(self, shape: str, along: Collection[str]) -> bool:
        """Whether values of a shape may differ among entries that lie along some of the axes."""
        return any(
            varies and axis in along for axis, varies in zip(self.axes, AXES[shape], strict=True)
        )


# Words whose value at one entry follows from others too.
_WHOLE = frozenset({*REDUCTIONS, MINMAX.__name__, ZSCORE.__name__})

_ROWS = (
    Domain(
        "matrix",
        axes=("output", "input"),
        shapes=tuple(AXES),
        reductions=_WHOLE,
        is_run_time=False,
    ),
    # One member of a group of units, turned so that its rows are units.
    Domain(
        "unit",
        axes=("unit", "part"),
        shapes=("row",),
        reductions=_WHOLE,
        is_run_time=False,
    ),
    # The experts that one router chooses from: what it does to tokens, and what each makes of them.
    Domain(
        "expert",
        axes=("expert", "number"),
        shapes=("row",),
        reductions=_WHOLE,
        is_run_time=False,
    ),
    # A part of the depth by itself: what it does to the stream and what it costs are numbers.
    Domain(
        "block",
        axes=("part of the depth", "number"),
        shapes=("row",),
        reductions=frozenset(),
        is_run_time=False,
    ),
    # Keys and values of one head. They are chosen once the queries are there, so what looks at all
    # of them looks at the past.
    Domain(
        "kv_column",
        axes=("query", "key"),
        shapes=("column",),
        reductions=_WHOLE,
        is_run_time=True,
    ),
    # What one head computes between tokens. Each query chooses by itself: a word that looks at more
    # than one entry would tell it of later queries, or of keys that it does not see.
    Domain(
        "link",
        axes=("query", "key"),
        shapes=("element", "column"),
        reductions=frozenset(),
        is_run_time=True,
    ),
)

DOMAINS: dict[str, Domain] = {row.name: row for row in _ROWS}
