"""How well does a model predict text, and how far has it moved from the dense one?

Windows go through the model one at a time; the output head runs in chunks, so the logits of a
whole window over a large vocabulary never exist at once. The dense model is remembered by its
final hidden states and by its own head, which make its answers whatever becomes of the model.

Beside them stand KL and two measures of what the pruned model is worth in use: how often the most
likely next token is the same, and how many tokens that it drafts speculative decoding keeps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.measures import TO_DENSE
from prunezero.models.saving.save import SavedSparsity, count_sparsity
from prunezero.models.text.windows import check_windows
from prunezero.scoring.tiles import row_tiles

__all__ = [
    "DenseReference",
    "Evaluation",
    "SavedSparsity",
    "count_sparsity",
    "dense_reference",
    "evaluate",
    "frequency_perplexity",
    "window_measures",
]

# Tokens whose logits exist together.
CHUNK = 512
# Tokens among which the dense model's first choice is looked for, where it need not be the first.
_LIKELIEST = 5
# Log-probabilities of a tile, in a CPU's second-level cache with room for two more; the quickest of
# 2**17 to 2**21 at 49,152 words.
TILE = 1 << 19
# Words among which the likeliest is looked for at once.
_BLOCK = 64
# Tokens on which the head alone is compared with the model's own logits.
PROBE = 8


# Asked for `loss` and each of `TO_DENSE` by window, so far.
Enough = Callable[[Mapping[str, Sequence[float]]], bool]


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
    top1_agreement: float | None = None
    """share of tokens at which the dense model's most likely token is also this model's"""
    top5_agreement: float | None = None
    """share of tokens at which it is among this model's five most likely"""
    acceptance: float | None = None
    """of tokens that this model drafts for the dense one, the share that speculative sampling
    keeps: the mean over tokens of the sum of min(p_dense, p_model) over the vocabulary (Leviathan
    et al. 2023, arXiv:2211.17192)"""
    windows: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """of each of `TO_DENSE` the mean of each window; nothing without a reference"""


@dataclass(frozen=True)
class DenseReference:
    """What the dense model answered on token windows."""

    states: Tensor
    """its final hidden states [count, length, hidden], on the CPU"""
    head: Mapping[str, Tensor]
    """parameters of its head, by name: the very tensors, not copies"""
    versions: tuple[int, ...]
    """of these tensors: torch counts what is written to them"""

    def refuse_if_written(self) -> None:
        """Refuse to go on where the head's numbers are not those of the dense model any more.

        Raises:
            ModelError: something wrote to the head, instead of giving the model another one.
        """
        if self.versions != _versions(self.head.values()):
            raise ModelError(
                "the output head was written to after the dense model's answers were kept, so "
                "they are lost; give the model another head instead, or measure the dense model "
                "anew"
            )


def dense_reference(language_model: LanguageModel, windows: Tensor) -> DenseReference:
    """What the dense model answers on the windows, to be kept while it is pruned.

    Raises:
        TextError: the model cannot be run on these ids.
    """
    check_windows(windows, language_model)
    model = language_model.model
    with torch.no_grad():
        states = [
            _hidden(model.base_model, ids[None].to(language_model.device)).cpu() for ids in windows
        ]
    head = dict(model.get_output_embeddings().named_parameters())
    return DenseReference(torch.cat(states), head, _versions(head.values()))


def _versions(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors)


def evaluate(
    language_model: LanguageModel,
    windows: Tensor,
    *,
    reference: DenseReference | None = None,
    enough: Enough | None = None,
) -> Evaluation:
    """Measure perplexity, and what is of `TO_DENSE` when the dense model's `reference` is given.

    Of tokens that are equally likely, the first of the vocabulary counts as the likelier one.

    Args:
        language_model: dense or pruned.
        windows: token ids [count, length].
        reference: what `dense_reference` returned for the same windows.
        enough: asked after each window; True leaves the rest out, and then everything
            is of the windows before alone.

    Raises:
        TextError: the model cannot be run on these ids.
        ModelError: the model's logits cannot be computed from its final hidden states, or the
            reference is of other windows, or of a head that was written to since.
    """
    check_windows(windows, language_model)
    started = time.perf_counter()
    losses: list[float] = []
    nearness: list[tuple[float, ...]] = []
    by_measure: dict[str, tuple[float, ...]] = {}
    with torch.no_grad():
        if reference is not None:
            _check_reference(reference, windows)
        head = find_head(language_model, windows)
        for place, ids in enumerate(windows):
            ids = ids.to(language_model.device)
            hidden = _hidden(language_model.model.base_model, ids[None])[0]
            dense = None
            if reference is not None:
                states = reference.states[place].to(hidden.device)
                dense = partial(dense_logits, language_model, reference, head, states)
            loss, near = window_measures(head, hidden, dense, ids)
            losses.append(loss)
            nearness.append(near)
            if reference is not None:
                by_measure = dict(zip(TO_DENSE, zip(*nearness, strict=True), strict=True))
            if enough is not None and enough({"loss": losses, **by_measure}):
                break
    means: dict[str, float | None] = {
        key: math.fsum(values) / len(values) for key, values in by_measure.items()
    }
    return Evaluation(
        perplexity=perplexity_of(losses),
        kl=means.pop("kl", None),
        tokens=len(losses) * (windows.shape[1] - 1),
        seconds=time.perf_counter() - started,
        window_losses=tuple(losses),
        windows=by_measure,
        **means,
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


def window_measures(
    head: Head, hidden: Tensor, dense: Callable[[slice], Tensor] | None, ids: Tensor
) -> tuple[float, tuple[float, ...]]:
    """Mean loss of one window in nats per predicted token, and its means of `TO_DENSE`.

    Args:
        dense: the dense model's logits at some places of the window; without it those are 0.
    """
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    near = loss.new_zeros(len(TO_DENSE))
    predicted = len(ids) - 1
    for start in range(0, predicted, CHUNK):
        places = slice(start, min(start + CHUNK, predicted))
        logits, wanted = head(hidden[places]), None if dense is None else dense(places)
        chances, *measures = token_measures(logits, wanted, ids[1:][places])
        loss -= chances.sum(dtype=torch.float64)
        for place, values in enumerate(measures):
            near[place] += values.sum(dtype=torch.float64)
    return float(loss) / predicted, tuple(total / predicted for total in near.tolist())


def token_measures(logits: Tensor, dense: Tensor | None, answers: Tensor) -> tuple[Tensor, ...]:
    """Of each token the log-probability of its answer, then each of `TO_DENSE`.

    A vocabulary is wide, so what is made of a few tokens fills the processor's cache: on a CPU they
    go through one tile after another, and each number is the same as of all tokens at once.

    Args:
        logits: of the model [tokens, vocabulary].
        dense: those of the dense model; without them only the log-probabilities are told.
        answers: token ids [tokens].
    """
    rows, words = logits.shape
    on_processor = logits.device.type == "cpu"
    tiles = list(row_tiles(rows, words, TILE)) if on_processor else [slice(0, rows)]
    parts = [
        _of_tile(logits[tile], None if dense is None else dense[tile], answers[tile])
        for tile in tiles
    ]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def _of_tile(logits: Tensor, dense: Tensor | None, answers: Tensor) -> list[Tensor]:
    log_chances = logits.float().log_softmax(-1)
    found = [log_chances.gather(1, answers[:, None])[:, 0]]
    if dense is not None:
        found += to_dense(log_chances, dense.float().log_softmax(-1))
    return found


def to_dense(log_chances: Tensor, wanted: Tensor) -> list[Tensor]:
    """Each of `TO_DENSE` for each token; both arguments are overwritten.

    Args:
        log_chances: of the model [tokens, vocabulary], float32.
        wanted: those of the dense model.
    """
    ahead = _ahead(log_chances, first_greatest(wanted))
    agreements = [
        (ahead < count).double().masked_fill_(ahead.isnan(), math.nan) for count in (1, _LIKELIEST)
    ]
    chances = wanted.exp()
    differences = wanted.sub_(log_chances).mul_(chances).sum(-1)
    # The sum of minima, by what the dense model gives more: exactly 1 where the two are the same.
    refused = chances.sub_(log_chances.exp_()).clamp_(min=0).sum(-1)
    return [differences, *agreements, 1 - refused.double()]


def first_greatest(values: Tensor) -> Tensor:
    """The index of the first of the greatest values of each row, or of the first NaN [rows, 1].

    On a CPU `argmax` looks at one value after another, and `amax` at many at a time: so it looks
    for the first of the greatest blocks, and then inside that block.
    """
    rows, words = values.shape
    whole = words // _BLOCK * _BLOCK
    if values.device.type != "cpu" or not whole:
        return values.argmax(-1, keepdim=True)
    greatest = values[:, :whole].view(rows, -1, _BLOCK).amax(-1)
    if whole < words:
        greatest = torch.cat([greatest, values[:, whole:].amax(-1, keepdim=True)], dim=1)
    begin = (greatest.argmax(-1, keepdim=True) * _BLOCK).clamp_(max=words - _BLOCK)
    # The last block is moved back to be whole; what stands before it there is not as great.
    inside = begin + torch.arange(_BLOCK)
    return begin + values.gather(1, inside).argmax(-1, keepdim=True)


def _ahead(log_chances: Tensor, tokens: Tensor) -> Tensor:
    """How many tokens the model finds likelier than one of each row.

    Of equally likely ones the first counts as likelier. NaN where the model gives no number.

    Args:
        log_chances: [rows, vocabulary], float32.
        tokens: indices of it [rows, 1].
    """
    own = log_chances.gather(1, tokens)
    # Ones and zeros as floats are added up quicker than truths, and exactly below 2**24.
    held = torch.empty_like(log_chances)
    as_likely = torch.ge(log_chances, own, out=held).sum(-1)
    ahead = as_likely - 1
    several = as_likely > 1
    few, theirs = log_chances[several], own[several]
    likelier = torch.gt(few, theirs, out=held[: len(few)]).sum(-1)
    # Whoever is as likely is looked for where there is one, since to count takes long.
    tied = as_likely[several] - likelier > 1
    indices = torch.arange(log_chances.shape[-1], device=tokens.device)
    before = (few[tied] == theirs[tied]) & (indices < tokens[several][tied])
    likelier[tied] += before.sum(-1)
    ahead[several] = likelier
    return ahead.masked_fill_(own[:, 0].isnan(), math.nan)


def dense_logits(
    language_model: LanguageModel,
    reference: DenseReference,
    head: Head,
    states: Tensor,
    places: slice,
) -> Tensor:
    """The dense model's logits at some places, from its hidden states by its own head."""
    with _holding(language_model.model.get_output_embeddings(), reference.head):
        return head(states[places])


@contextmanager
def _holding(module: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, the module computes with these parameters; its own come back afterwards."""
    own = dict(module.named_parameters())
    _hand_over(module, parameters)
    try:
        yield
    finally:
        _hand_over(module, own)


def _hand_over(module: nn.Module, parameters: Mapping[str, Any]) -> None:
    for path, parameter in parameters.items():
        owner, _, name = path.rpartition(".")
        module.get_submodule(owner)._parameters[name] = parameter


def perplexity_of(losses: Sequence[float]) -> float:
    """Perplexity of windows of one length by their mean nats per token; NaN if it is not finite."""
    # Windows are equally long, so the mean of their means is the mean over all tokens.
    mean = math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.nan
    try:
        return math.exp(mean)
    except OverflowError:
        return math.nan


def _hidden(body: Any, ids: Tensor) -> Tensor:
    return body(ids, use_cache=False).last_hidden_state


def find_head(language_model: LanguageModel, windows: Tensor) -> Head:
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


def _check_reference(reference: DenseReference, windows: Tensor) -> None:
    reference.refuse_if_written()
    shape = reference.states.shape[:2]
    if shape != windows.shape:
        raise ModelError(
            f"the dense reference is of {list(shape)} windows and tokens but the "
            f"model is measured on {list(windows.shape)}; make it from the same windows"
        )
