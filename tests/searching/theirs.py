"""A strategy as another package would bring it."""

from __future__ import annotations

from prunezero.searching.strategies.evolution import Strategy, fresh, without_state

STRATEGY = Strategy(without_state(fresh), "from elsewhere")
