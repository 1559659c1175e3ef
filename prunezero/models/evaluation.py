"""How well does a model predict text, and how far has it moved from the dense one?

Windows go through the model one at a time; the output head runs in chunks, so the logits of a
whole window over a large vocabulary never exist at once. The dense model is remembered by its
final hidden states, because pruning leaves the head alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunezero.errors import ModelError
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.saving.save import SavedSparsity, count_sparsity
from prunezero.models.text.windows import check_windows

__all__ = [
    "Evaluation",
    "SavedSparsity",
    "count_sparsity",
    "dense_reference",
    "evaluate",
    "frequency_perplexity",
]

# Tokens whose logits exist together.
CHUNK = 512
# Tokens on which the head alone is compared with the model's own logits.
PROBE = 8


@dataclass(frozen=True)
class Evaluation:
    """One measurement on token windows."""

    perplexity: float
    """exp of the mean nats per predicted token; NaN when the model gives no finite loss"""
    kl: float | None
    """mean nats per predicted token of KL(dense || model); None without a reference"""
    tokens: int
    """predicted tokens"""
    seconds: float
    """elapsed"""
    window_losses: tuple[float, ...]
    """mean nats per predicted token of each window"""


def dense_reference(language_model: LanguageModel, windows: Tensor) -> Tensor:
    """Final hidden states of the dense model on the windows: [count, length, hidden], on the CPU.

    Raises:
        TextError: the model cannot be run on these ids.
    """
    check_windows(windows, language_model)
    body = language_model.model.base_model
    with torch.no_grad():
        states = [_hidden(body, ids[None].to(language_model.device)).cpu() for ids in windows]
    return torch.cat(states)


def evaluate(
    language_model: LanguageModel, windows: Tensor, *, reference: Tensor | None = None
) -> Evaluation:
    """Measure perplexity, and the distance to the dense model when its `reference` is given.

    Args:
        language_model: dense or pruned.
        windows: token ids [count, length].
        reference: what `dense_reference` returned for the same windows.

    Raises:
        TextError: the model cannot be run on these ids.
        ModelError: the model's logits cannot be computed from its final hidden states, or the
            reference is of other windows.
    """
    check_windows(windows, language_model)
    started = time.perf_counter()
    losses: list[float] = []
    divergences: list[float] = []
    with torch.no_grad():
        if reference is not None:
            _check_reference(reference, windows)
        head = _find_head(language_model, windows)
        for place, ids in enumerate(windows):
            ids = ids.to(language_model.device)
            hidden = _hidden(language_model.model.base_model, ids[None])[0]
            dense = None if reference is None else reference[place].to(hidden.device)
            loss, divergence = _window(head, hidden, dense, ids)
            losses.append(loss)
            divergences.append(divergence)
    return Evaluation(
        perplexity=_perplexity(losses),
        kl=None if reference is None else math.fsum(divergences) / len(divergences),
        tokens=windows.shape[0] * (windows.shape[1] - 1),
        seconds=time.perf_counter() - started,
        window_losses=tuple(losses),
    )


def frequency_perplexity(windows: Tensor, seen: Tensor, vocabulary: int) -> float:
    """Perplexity on windows of a model that knows how frequent tokens are, and nothing else.

    Args:
        windows: token ids [count, length]; as by `evaluate`, the first of each is not predicted.
        seen: token ids of other text, [count, length], in which it counts.
        vocabulary: tokens that there are; those not seen share the chance of a new one.

    Source: Witten and Bell 1991, method C, doi:10.1109/18.87000.
    """
    counts = torch.bincount(seen[:, 1:].flatten(), minlength=vocabulary).double()
    kinds = int((counts > 0).sum())
    chances = (counts + kinds / vocabulary) / (counts.sum() + kinds)
    return math.exp(-float(chances[windows[:, 1:]].log().mean()))


# From final hidden states [tokens, hidden] to logits [tokens, vocabulary].
Head = Callable[[Tensor], Tensor]


def _window(head: Head, hidden: Tensor, dense: Tensor | None, ids: Tensor) -> tuple[float, float]:
    """Mean loss and mean divergence of one window, in nats per predicted token."""
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    divergence = loss.clone()
    predicted = len(ids) - 1
    for start in range(0, predicted, CHUNK):
        places = slice(start, min(start + CHUNK, predicted))
        log_chances = head(hidden[places]).float().log_softmax(-1)
        answers = ids[1:][places, None]
        loss -= log_chances.gather(1, answers).sum(dtype=torch.float64)
        if dense is not None:
            wanted = head(dense[places]).float().log_softmax(-1)
            differences = (wanted.exp() * (wanted - log_chances)).sum(-1)
            divergence += differences.sum(dtype=torch.float64)
    return float(loss) / predicted, float(divergence) / predicted


def _perplexity(losses: list[float]) -> float:
    # Windows are equally long, so the mean of their means is the mean over all tokens.
    mean = math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.nan
    try:
        return math.exp(mean)
    except OverflowError:
        return math.nan


def _hidden(body: Any, ids: Tensor) -> Tensor:
    return body(ids, use_cache=False).last_hidden_state


def _find_head(language_model: LanguageModel, windows: Tensor) -> Head:
    """What makes this model's logits of final hidden states: its head, or all it does after it."""
    model = language_model.model
    ids = windows[:1, :PROBE].to(language_model.device)
    logits = model(ids, use_cache=False).logits[0]
    hidden = _hidden(model.base_model, ids)[0]
    plain: Head = model.get_output_embeddings()
    # A model may cap or scale its logits: then its own forward is run on the given hidden states.
    for head in (plain, lambda states: _logits_of(model, states)):
        if _makes(head, hidden, logits):
            return head
    raise ModelError(
        f"the logits of {type(model).__name__} do not follow from its final hidden states; "
        "this layout is not supported"
    )


def _makes(head: Head, hidden: Tensor, logits: Tensor) -> bool:
    try:
        made = head(hidden)
    except RuntimeError:
        # Hidden states of a wider dtype than the head's, which the model narrows by itself.
        return False
    return torch.allclose(made.float(), logits.float(), rtol=1e-3, atol=1e-4, equal_nan=True)


def _logits_of(model: Any, states: Tensor) -> Tensor:
    with _answering(model.base_model, states[None]):
        ids = torch.zeros((1, len(states)), dtype=torch.int64, device=states.device)
        return model(ids, use_cache=False).logits[0]


@contextmanager
def _answering(body: Any, states: Tensor) -> Iterator[None]:
    """Within it, the body answers with these hidden states, whatever it is asked."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    usual = body.forward
    body.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=states)
    try:
        yield
    finally:
        body.forward = usual


def _check_reference(reference: Tensor, windows: Tensor) -> None:
    if reference.shape[:2] != windows.shape:
        raise ModelError(
            f"the dense reference is of {list(reference.shape[:2])} windows and tokens but the "
            f"model is measured on {list(windows.shape)}; make it from the same windows"
        )
