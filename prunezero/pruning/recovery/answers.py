"""What the dense model answered on calibration windows, kept while a pruned one is trained.

Its final hidden states and its own head make all its logits, and take less room than a few hundred
of them for each token; only where fewer are asked for are logits kept themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.models.anatomy.linears import find_blocks
from prunezero.models.evaluation import (
    DenseReference,
    Head,
    dense_logits,
    dense_reference,
    find_head,
)
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.calibration import Progress
from prunezero.models.observing.hooks import removing
from prunezero.models.text.windows import check_windows
from prunezero.pruning.recipes.training_options import Distil


@dataclass(frozen=True)
class DenseAnswers:
    """The dense model's next-token distributions on calibration windows, and its blocks' outputs.

    Tensors are on the CPU; a window is known by its place among the calibration windows.
    """

    language_model: LanguageModel
    temperature: float
    """by which its logits are divided"""
    rows: Mapping[int, int]
    """where a window is found in the tensors, by its place"""
    reference: DenseReference
    """its final hidden states; none where logits of a few tokens are kept"""
    head: Head
    likeliest: tuple[tuple[Tensor, Tensor], ...] = ()
    """of each window, where few tokens are kept, what `log_chances` gives"""
    outputs: tuple[Tensor, ...] = ()
    """of its blocks on each window [blocks, length, hidden], where they are asked for"""

    def log_chances(self, place: int) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of the tokens of a window after the first, on the model's device.

        Returns:
            [length - 1, vocabulary] and None; or [length - 1, top + 1], the last that of all other
            tokens together, and the tokens [length - 1, top].
        """
        row, device = self.rows[place], self.language_model.device
        if self.likeliest:
            chances, tokens = self.likeliest[row]
            return chances.to(device), tokens.to(device, torch.int64)
        states = self.reference.states[row].to(device)
        with torch.no_grad():
            logits = dense_logits(
                self.language_model, self.reference, self.head, states, slice(len(states) - 1)
            )
            return log_chances(logits.float(), self.temperature), None

    def states(self, place: int) -> Tensor:
        """The blocks' outputs on a window [blocks, length, hidden], on the model's device."""
        return self.outputs[self.rows[place]].to(self.language_model.device)


@torch.no_grad()
def dense_answers(
    language_model: LanguageModel,
    windows: Tensor,
    options: Distil,
    *,
    sources: int = 1,
    progress: Progress | None = None,
) -> DenseAnswers:
    """What a model, dense still, answers on the windows that a training will use.

    Args:
        windows: calibration token ids [count, length].
        sources: that these are of.
        progress: told (what, windows done, and their total).

    Raises:
        TextError: the model cannot be run on these ids.
        ModelError: its logits cannot be computed from its final hidden states.
    """
    check_windows(windows, language_model)
    places = [place for part in options.split(len(windows), sources) for place in part]
    references, outputs = [], []
    for done, place in enumerate(places, start=1):
        with blocks_seen(language_model.model, is_asked=options.states > 0) as seen:
            references.append(dense_reference(language_model, windows[[place]]))
        outputs += [torch.stack(seen).cpu()] if seen else []
        if progress:
            progress("windows answered by the dense model", done, len(places))
    states = torch.cat([one.states for one in references])
    answers = DenseAnswers(
        language_model,
        options.temperature,
        {place: row for row, place in enumerate(places)},
        replace(references[0], states=states),
        find_head(language_model, windows),
        outputs=tuple(outputs),
    )
    return _with_few(answers, options.top) if options.top else answers


def _with_few(answers: DenseAnswers, top: int) -> DenseAnswers:
    """The same, with so many tokens at each place instead of all; all where there are no more."""
    likeliest = []
    for place in answers.rows:
        chances, _ = answers.log_chances(place)
        if chances.shape[-1] <= top:
            return answers
        tokens = chances.topk(top).indices
        few = log_chances(chances, 1.0, tokens)
        likeliest.append((few.cpu(), tokens.to("cpu", torch.int32)))
    reference = replace(answers.reference, states=answers.reference.states[:0])
    return replace(answers, likeliest=tuple(likeliest), reference=reference)


def log_chances(logits: Tensor, temperature: float, tokens: Tensor | None = None) -> Tensor:
    """Log-probabilities of softmax(logits / T) at each place [length, vocabulary].

    Args:
        tokens: [length, count] to look at alone, all others counting as one, the last.
    """
    scaled = logits / temperature
    if tokens is None:
        return scaled.log_softmax(-1)
    others = scaled.scatter(-1, tokens, -math.inf).logsumexp(-1, keepdim=True)
    whole = scaled.logsumexp(-1, keepdim=True)
    return torch.cat([scaled.gather(-1, tokens), others], -1) - whole


@contextmanager
def blocks_seen(model: nn.Module, *, is_asked: bool = True) -> Iterator[list[Tensor]]:
    """Within it, a forward pass on one window appends each block's output [length, hidden].

    Args:
        is_asked: otherwise nothing is seen.
    """
    outputs: list[Tensor] = []

    def see(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).squeeze(0))

    handles: list[Any] = []
    with removing(handles):
        if is_asked:
            handles += [block.register_forward_hook(see) for block in find_blocks(model)]
        yield outputs
