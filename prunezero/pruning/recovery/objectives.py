"""Objectives of a training: what of a model's answers to one window is to become small?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.nn.functional import cross_entropy

from prunezero.models.observing.gradients import sequence_loss
from prunezero.pruning.recipes.training_options import Distil
from prunezero.pruning.recovery.answers import DenseAnswers, blocks_seen, log_chances


class Objective(Protocol):
    """What training makes smaller."""

    def loss(self, model: Any, ids: Tensor, place: int) -> Tensor:
        """The loss of one window, with its graph.

        Args:
            ids: token ids [length], on the device of the model.
            place: the index of the window among the calibration windows.
        """


class NextToken:
    """The mean cross-entropy, in nats, of the tokens of a window after the first."""

    def loss(self, model: Any, ids: Tensor, place: int) -> Tensor:
        """See `Objective`."""
        return sequence_loss(model, ids[None])


class ToDense:
    """The distance of the next-token distribution from the dense model's.

        T^2 KL(dense || model) + plain * cross-entropy + states * distance of the blocks' outputs

    Both distributions are softmax(logits / T), and all three are means over the tokens of a window
    after the first. The distance of a block is the squared difference of its outputs, over the mean
    square of the dense ones; over the blocks the mean is taken.

    Source: Hinton et al. 2015, arXiv:1503.02531; the last part Kurtic et al. 2023, SquareHead,
    arXiv:2310.06927.
    """

    def __init__(self, answers: DenseAnswers, options: Distil) -> None:
        """Compare with what the dense model answered on the calibration windows."""
        self._answers = answers
        self._options = options

    def loss(self, model: Any, ids: Tensor, place: int) -> Tensor:
        """See `Objective`."""
        options = self._options
        with blocks_seen(model, is_asked=options.states > 0) as outputs:
            logits = model(ids[None], use_cache=False).logits[0, :-1].float()
        wanted, tokens = self._answers.log_chances(place)
        found = log_chances(logits, options.temperature, tokens)
        loss = options.temperature**2 * (wanted.exp() * (wanted - found)).sum(-1).mean()
        if options.plain:
            loss = loss + options.plain * cross_entropy(logits, ids[1:])
        if options.states:
            loss = loss + options.states * _distance(outputs, self._answers.states(place))
        return loss


def _distance(outputs: Sequence[Tensor], wanted: Tensor) -> Tensor:
    """The mean over blocks of relative squared distances.

    Args:
        wanted: of the dense model [blocks, length, hidden].
    """
    parts = [
        (output.float() - dense.float()).square().mean() / dense.float().square().mean()
        for output, dense in zip(outputs, wanted, strict=True)
    ]
    return sum(parts[1:], parts[0]) / len(parts)
