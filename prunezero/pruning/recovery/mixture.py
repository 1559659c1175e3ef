"""Of which sources is the text of a training, and how did the dense model do on each of them?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.calibration import Progress
from prunezero.models.observing.gradients import sequence_loss
from prunezero.models.text.windows import check_windows
from prunezero.pruning.recipes.training_options import Training


@dataclass(frozen=True)
class Mixture:
    """The sources of calibration windows, of which there are several."""

    names: tuple[str, ...]
    """in the order in which the text names them"""
    labels: tuple[int, ...]
    """of each window, the place of its source among the names"""
    dense: Mapping[int, float] = field(default_factory=dict)
    """nats per token of the dense model on windows held out, by their places; empty where sources
    are not measured"""

    @property
    def sources(self) -> tuple[str, ...]:
        """Of each window, by name."""
        return tuple(self.names[label] for label in self.labels)

    @property
    def request(self) -> dict[str, Any]:
        """What the order of windows follows from beside the model, as plain numbers."""
        return {"sources": list(self.labels)}

    def places(self, source: int, among: Iterable[int]) -> list[int]:
        """The windows of a source, by place."""
        return [place for place in among if self.labels[place] == source]

    def growth(self, losses: Mapping[int, float]) -> tuple[float, ...]:
        """Of each source its loss over the dense model's, 1 where it is as good.

        Args:
            losses: nats per token on the windows held out, by their places.
        """
        windows = (self.places(source, self.dense) for source in range(len(self.names)))
        return tuple(
            sum(losses[place] for place in some) / sum(self.dense[place] for place in some)
            for some in windows
        )


@dataclass(frozen=True)
class SourceReport:
    """What a training did with one source of its text."""

    name: str
    tokens: int
    """in its sequences that were trained on"""
    skipped: int
    """steps with sequences of it that changed nothing, since something was not finite"""
    shares: tuple[tuple[int, float], ...] = ()
    """steps done by then, and its share of the sequences from there on; none where all windows
    come equally often"""
    growth: tuple[tuple[int, float], ...] = ()
    """steps done by then, and its loss on held-out windows over the dense model's"""


def mixture_of(
    language_model: LanguageModel,
    windows: Tensor,
    sources: Sequence[str],
    options: Training,
    progress: Progress | None = None,
) -> Mixture | None:
    """The sources of a training text, measured where the options ask for it; None of one source.

    Args:
        language_model: dense still.
        windows: calibration token ids [count, length].
        sources: of each window, by name; none where there is one.
        progress: told (what, windows done, and their total).

    Raises:
        TextError: the model cannot be run on these ids.
    """
    names = tuple(dict.fromkeys(sources))
    if len(names) < 2:
        return None
    labels = tuple(map(names.index, sources))
    if not options.measures(len(names)):
        return Mixture(names, labels)
    check_windows(windows, language_model)
    _, held_out = options.split(len(windows), len(names))
    return Mixture(names, labels, losses_of(language_model, windows, held_out, progress))


@torch.no_grad()
def losses_of(
    language_model: LanguageModel,
    windows: Tensor,
    places: Sequence[int],
    progress: Progress | None = None,
) -> dict[int, float]:
    """Nats per predicted token on some windows [count, length], by their places."""
    losses = {}
    for done, place in enumerate(places, start=1):
        ids = windows[place][None].to(language_model.device)
        losses[place] = float(sequence_loss(language_model.model, ids))
        if progress is not None:
            progress("windows of sources read by the dense model", done, len(places))
    return losses
