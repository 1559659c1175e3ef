"""What a search remembers of one formula that it tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prunezero.formula.criterion import Criterion

# A new mask; a mask seen before; a formula whose scores are not finite or rank nothing.
STATUSES = ("new", "known", "invalid")


@dataclass(frozen=True)
class Candidate:
    """One formula that a search tried, and how far up the ladder it came."""

    slot: int
    """its place in the order of proposals"""
    generation: int
    """0 holds the seeds and fresh formulas"""
    criterion: Criterion
    """the formula"""
    origin: str
    """seed, random, mutate, cross or tune"""
    parents: tuple[int, ...]
    """slots of the candidates it was made from"""
    status: str
    """one of STATUSES"""
    mask: str = ""
    """digest of its mask on the probe"""
    layer_error: float | None = None
    """gradient-weighted error of the layers' outputs on sampled rows"""
    search_perplexity: float | None = None
    """of the pruned model on search text; None unless it earned that"""
    seconds: float = 0.0
    """spent on it"""
    is_replayed: bool = False
    """whether its results were read from the journal of an earlier session"""

    def row(self) -> dict[str, Any]:
        """The candidate as one flat row of a table."""
        return {
            "slot": self.slot,
            "generation": self.generation,
            "origin": self.origin,
            "parents": list(self.parents),
            "status": self.status,
            "formula": self.criterion.text,
            "complexity": self.criterion.complexity,
            "depth": self.criterion.depth,
            "signal": self.criterion.signal,
            "fingerprint": self.criterion.fingerprint,
            "mask": self.mask,
            "layer_error": self.layer_error,
            "search_perplexity": self.search_perplexity,
            "seconds": self.seconds,
        }
