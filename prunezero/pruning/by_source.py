"""What was trained and measured on each source of a text, as columns of a row?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from prunezero.models.evaluation import perplexity_of
from prunezero.pruning.recovery.training import TrainingReport

# Columns of curves, each a dict by source, and what of a `SourceReport` they are.
SOURCE_CURVES = {"source_shares": "shares", "source_growth": "growth"}


def perplexity_by_source(losses: Sequence[float], sources: Sequence[str]) -> dict[str, float]:
    """Perplexity on the windows of each source, by its name.

    Args:
        losses: mean nats per token of each window, all of one length.
        sources: of each window, by name.
    """
    pairs = list(zip(losses, sources, strict=True))
    return {
        name: perplexity_of([loss for loss, source in pairs if source == name])
        for name in dict.fromkeys(sources)
    }


def trained_by_source(trainings: Sequence[TrainingReport]) -> dict[str, Any]:
    """What trainings did with each source, by its name; no columns of text of one source.

    Curves are lists of steps, over all trainings one after another, and values there: shares hold
    from there on, and growth is the loss on held-out windows over the dense model's.
    """
    names = list(dict.fromkeys(one.name for training in trainings for one in training.sources))
    if not names:
        return {}
    every = [one for training in trainings for one in training.sources]
    told: dict[str, Any] = {"sources": ", ".join(names)}
    for column, attribute in (("trained_tokens", "tokens"), ("steps_skipped", "skipped")):
        told[f"{column}_by_source"] = {
            name: sum(getattr(one, attribute) for one in every if one.name == name)
            for name in names
        }
    for column, attribute in SOURCE_CURVES.items():
        curves = {name: _curve(trainings, name, attribute) for name in names}
        told |= {column: curves} if any(curves.values()) else {}
    return told


def _curve(
    trainings: Sequence[TrainingReport], name: str, attribute: str
) -> list[tuple[int, float]]:
    """A curve of one source over all trainings, without numbers that are not finite."""
    points: list[tuple[int, float]] = []
    begin = 0
    for training in trainings:
        (own,) = (one for one in training.sources if one.name == name)
        curve = getattr(own, attribute)
        points += [(begin + at, value) for at, value in curve if math.isfinite(value)]
        begin += len(training.losses)
    return points
