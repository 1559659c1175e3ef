"""What does one attention see of a text: queries, keys and values, as it works on them itself.

Keys and values are those of the cache, turned by their positions where a model does that. Here is
also what has to be measured beforehand: how queries of other text are distributed at the places
that follow a prompt, and, for the oracle, how much attention its keys then really receive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from prunezero.errors import ModelError
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.attending.interface import Call, remembering_layers, watched_attention
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.text.windows import check_length

# Queries whose attention exists together.
CHUNK = 128


@dataclass(frozen=True)
class Looks:
    """How far features look."""

    window: int = 32
    """last queries that ATT_W looks at"""
    pool: int = 5
    """neighbouring keys over which ATT_W is averaged, an odd number"""
    lag: int = 128
    """tokens of a chunk that LAGK and LAGV compare with the next"""
    seed: int = 0
    """of RNDK"""


@dataclass(frozen=True)
class Measured:
    """What is known of one layer beforehand."""

    query_mean: Tensor | None = None
    """mean query [query heads, width] of calibration text behind a prompt's end"""
    query_covariance: Tensor | None = None
    """[query heads, width, width]"""
    next_attention: Tensor | None = None
    """attention that keys receive from the tokens that follow [key-value heads, keys]"""
    reread_attention: Tensor | None = None
    """the most that keys receive when the text is read once more [key-value heads, keys]"""
    streaming_error: Tensor | None = None
    """how far outputs of heads move on calibration text that comes again, beside their size, when
    the heads see the first and the recent keys alone [key-value heads]"""


@dataclass(frozen=True)
class Attended:
    """One layer and one text, float32, without a batch.

    Of a prompt all queries are there; later the last few, and only the keys that stayed.
    """

    layer: int
    """its index in the model"""
    queries: Tensor
    """[query heads, queries, width]: the last ones, the last of which is that of the last key"""
    keys: Tensor
    """[key-value heads, keys, width]"""
    values: Tensor
    """[key-value heads, keys, width]"""
    positions: Tensor
    """how many tokens stand before each key, int64 [key-value heads, keys]"""
    scaling: float
    """what products of query and key are multiplied by"""
    softcap: float | None = None
    """what the products then approach, by tanh; None where they may be any"""
    writer: Tensor | None = None
    """the output projection [hidden, query heads x width]"""
    received: tuple[Tensor, Tensor] | None = None
    """sum and maximum of the attention that each key received so far, where earlier queries are
    gone [key-value heads, keys]"""
    measured: Measured = field(default_factory=Measured)
    """what is known beforehand"""

    @property
    def seen(self) -> int:
        """Tokens of the text so far."""
        return int(self.positions.max()) + 1

    @property
    def grouped(self) -> Tensor:
        """Queries by the key-value head that they read [key-value heads, group, queries, width]."""
        heads, count, width = self.queries.shape
        return self.queries.view(len(self.keys), heads // len(self.keys), count, width)

    def logits(self, start: int, stop: int) -> Tensor:
        """What the softmax is made of, [key-value heads, group, stop - start, keys].

        Minus infinity where a key stands behind a query.

        Args:
            start, stop: of the queries that are there.
        """
        found = self.grouped[:, :, start:stop] @ self.keys[:, None].mT * self.scaling
        if self.softcap is not None:
            found = self.softcap * torch.tanh(found / self.softcap)
        first = self.seen - self.queries.shape[1]
        places = torch.arange(first + start, first + stop, device=found.device)
        behind = self.positions[:, None, None] > places[:, None]
        return found.masked_fill(behind, -torch.inf)

    def attention(self, start: int, stop: int) -> Tensor:
        """Attention, the mean over a group [key-value heads, stop - start, keys]."""
        return self.logits(start, stop).softmax(-1).mean(1)

    @cached_property
    def totals(self) -> tuple[Tensor, Tensor]:
        """Sum and maximum of the attention that each key receives [key-value heads, keys]."""
        if self.received is not None:
            return self.received
        total = torch.zeros(self.keys.shape[:2], dtype=torch.float64, device=self.keys.device)
        most = torch.zeros(self.keys.shape[:2], device=self.keys.device)
        count = self.queries.shape[1]
        for start in range(0, count, CHUNK):
            part = self.attention(start, min(start + CHUNK, count))
            total += part.sum(1, dtype=torch.float64)
            most = torch.maximum(most, part.amax(1))
        return total.float(), most


def attended_of(
    call: Call,
    *,
    item: int = 0,
    places: Tensor | None = None,
    writer: Tensor | None = None,
    measured: Measured | None = None,
) -> Attended:
    """What one layer sees of one text of a batch.

    Args:
        places: of the tokens that are none of padding, int64 [keys]; all if left out.
    """
    queries, keys, values = (one[item].float() for one in (call.queries, call.keys, call.values))
    if places is not None:
        queries, keys, values = (one[:, places] for one in (queries, keys, values))
    positions = torch.arange(keys.shape[1], device=keys.device).expand(keys.shape[:2])
    return Attended(
        *(call.layer, queries, keys, values, positions, call.scaling, call.softcap, writer),
        measured=measured or Measured(),
    )


def writers(language_model: LanguageModel) -> dict[int, Tensor]:
    """The output projection [hidden, query heads x width] of each layer's attention, by its index.

    It is the last linear map of the module that calls attention.
    """
    called: dict[int, str] = {}
    names = {id(module): name for name, module in language_model.model.named_modules()}

    def note(call: Call) -> tuple[Tensor, Tensor | None]:
        called[call.layer] = names[id(call.module)]
        return call.usual()

    ids = torch.zeros((1, 2), dtype=torch.long, device=language_model.device)
    with watched_attention(language_model, note), torch.no_grad():
        language_model.model(ids, use_cache=False)
    linears = find_linears(language_model.model)
    found = {}
    for layer, name in called.items():
        inside = [one for one in linears if one.name.startswith(f"{name}.")]
        if not inside:
            raise ModelError(
                f"'{name}' calls attention but holds no linear map behind it, so feature VON is "
                "not known there; use another formula"
            )
        found[layer] = inside[-1].weight
    return found


def query_moments(
    language_model: LanguageModel, windows: Tensor, start: int
) -> dict[int, Measured]:
    """How queries of calibration text are distributed at the places from `start` on, by layer.

    At those places they are turned as the coming queries of a prompt of so many tokens will be, so
    mean and covariance hold the average over coming positions.

    Args:
        windows: token ids [count, length], longer than `start`.

    Raises:
        ModelError: they are not, or the model has no such attention.
    """
    if windows.shape[1] <= start + 1:
        raise ModelError(
            f"calibration windows of {windows.shape[1]} tokens say nothing of queries behind a "
            f"prompt of {start}; use longer ones"
        )
    sums: dict[int, list[Tensor]] = {}

    def note(call: Call) -> tuple[Tensor, Tensor | None]:
        rows = call.queries[0, :, start:].double()
        new = [rows.sum(1), rows.mT @ rows]
        old = sums.get(call.layer)
        sums[call.layer] = [a + b for a, b in zip(old, new, strict=True)] if old else new
        return call.usual()

    with watched_attention(language_model, note), torch.no_grad():
        for ids in windows:
            language_model.model.base_model(ids[None].to(language_model.device), use_cache=False)
    count = len(windows) * (windows.shape[1] - start)
    found = {}
    for layer, (total, squares) in sums.items():
        mean = total / count
        covariance = squares / count - mean[:, :, None] * mean[:, None]
        found[layer] = Measured(mean.float(), covariance.float())
    return found


def next_attention(language_model: LanguageModel, ids: Tensor, start: int) -> dict[int, Measured]:
    """Attention that the keys of a prompt receive from the tokens behind it, by layer: an oracle.

    Args:
        ids: token ids [length] of the prompt and what follows.
        start: tokens of the prompt.
    """
    found = {}
    layers = remembering_layers(language_model)

    def note(call: Call) -> tuple[Tensor, Tensor | None]:
        if call.layer in layers:
            attended = attended_of(call)
            following = range(start, len(ids), CHUNK)
            parts = [attended.attention(at, min(at + CHUNK, len(ids))) for at in following]
            received = torch.cat(parts, 1).sum(1)[:, :start]
            found[call.layer] = Measured(next_attention=received)
        return call.usual()

    with watched_attention(language_model, note), torch.no_grad():
        language_model.model.base_model(ids[None].to(language_model.device), use_cache=False)
    return found


def reread_attention(language_model: LanguageModel, ids: Tensor) -> dict[int, Measured]:
    """The most attention that each key receives when its text is read once more, by layer.

    The largest over queries and over the query heads that read a key-value head.

    Args:
        ids: token ids [length] of the text.

    Raises:
        TextError: twice the text is longer than the model can read.

    Source: Kim et al. 2025, KVzip, arXiv:2505.23416, section 3.2, without words between.
    """
    twice, start = torch.cat([ids, ids]), len(ids)
    check_length(len(twice), language_model)
    found = {}
    layers = remembering_layers(language_model)

    def note(call: Call) -> tuple[Tensor, Tensor | None]:
        if call.layer in layers:
            attended = attended_of(call)
            most = torch.zeros(len(attended.keys), start, device=ids.device)
            for at in range(start, 2 * start, CHUNK):
                part = attended.logits(at, min(at + CHUNK, 2 * start)).softmax(-1)
                most = torch.maximum(most, part[..., :start].amax((1, 2)).to(most.device))
            found[call.layer] = Measured(reread_attention=most)
        return call.usual()

    with watched_attention(language_model, note), torch.no_grad():
        language_model.model.base_model(twice[None].to(language_model.device), use_cache=False)
    return found


def streaming_errors(
    language_model: LanguageModel, windows: Tensor, start: int, *, sinks: int, recent: int
) -> dict[int, Measured]:
    """How far outputs of heads move when they see the first and the recent keys alone, by layer.

    Squared distances over squared sizes, both summed over queries from `start` on and over the
    query heads that read a key-value head. The model itself goes on with what all keys say.

    Args:
        windows: token ids [count, length], longer than `start`.
        sinks: first keys that are seen.
        recent: keys at a query and just before it that are seen.

    Source: what the gates of Xiao et al. 2024, DuoAttention, arXiv:2410.10819, are trained on.
    """
    layers = remembering_layers(language_model)
    sums: dict[int, Tensor] = {}

    def note(call: Call) -> tuple[Tensor, Tensor | None]:
        if call.layer in layers:
            moved = _moved(attended_of(call), start, sinks, recent)
            sums[call.layer] = sums.get(call.layer, torch.zeros_like(moved)) + moved
        return call.usual()

    with watched_attention(language_model, note), torch.no_grad():
        for ids in windows:
            language_model.model.base_model(ids[None].to(language_model.device), use_cache=False)
    return {
        layer: Measured(streaming_error=(distance / size.clamp(min=1e-300)).float())
        for layer, (distance, size) in sums.items()
    }


def _moved(attended: Attended, start: int, sinks: int, recent: int) -> Tensor:
    """Squared distances and squared sizes, summed, float64 [2, key-value heads]."""
    total = torch.zeros(2, len(attended.keys), dtype=torch.float64, device=attended.keys.device)
    keys = torch.arange(attended.keys.shape[1], device=attended.keys.device)
    values = attended.values[:, None]
    for begin in range(start, len(keys), CHUNK):
        end = min(begin + CHUNK, len(keys))
        logits = attended.logits(begin, end)
        is_near = keys[begin:end, None] - keys < recent
        streams = logits.masked_fill(~(is_near | (keys < sinks)), -torch.inf)
        whole = logits.softmax(-1) @ values
        parts = (whole - streams.softmax(-1) @ values, whole)
        total += torch.stack([one.double().square().sum((1, 2, 3)) for one in parts])
    return total


def merged(one: Mapping[int, Measured], other: Mapping[int, Measured]) -> dict[int, Measured]:
    """What is known of each layer by either; of the same thing, what the other says."""
    found = dict(one)
    for layer, new in other.items():
        known = {key: value for key, value in vars(new).items() if value is not None}
        found[layer] = replace(found.get(layer, Measured()), **known)
    return found
