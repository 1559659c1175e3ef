"""The lines of an exported page that compute features and sums: the torch text of their rows."""

from __future__ import annotations

import re
from collections.abc import Iterable

from prunezero.formula.features import FEATURES
from prunezero.scoring.statistics import SUMS

# Names that a feature's text reads, and how a page makes them.
_MADE = {"upper": "inverse_factor(stats, DAMPING)"}


def feature_lines(name: str) -> list[str]:
    """The lines that give a feature its value, from `weight` and the `stats` of a layer."""
    row = FEATURES[name]
    line = row.line
    for read in {*row.inputs} - {"weight", *_MADE}:
        line = re.sub(rf"\b{read}\b", f'stats["{read}"]', line)
    return [
        *(f"{made} = {_MADE[made]}" for made in row.inputs if made in _MADE),
        f"{name} = {line}",
    ]


def sum_lines(source: str, sums: Iterable[str]) -> list[str]:
    """The lines that add to those of the sums that are made from a source what its values give."""
    return [
        f'{"add_row" if row.by_sequence else "add"}(stats, "{source}", "{name}", {row.torch})'
        for name, row in SUMS.items()
        if name in sums and row.source == source
    ]
