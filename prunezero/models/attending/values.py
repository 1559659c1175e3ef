"""The values of features of an attention, from what one layer saw of a text.

The torch text of a feature's row reads what stands in `VALUES`, each of [key-value heads, keys] if
it is not said otherwise.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from prunezero.errors import StatisticsError
from prunezero.formula.features import FEATURES
from prunezero.models.attending.observing import Attended, Looks
from prunezero.scoring.torch_text import function_of

Value = Callable[[Attended, Looks], Tensor]


def column_features(names: Iterable[str], attended: Attended, looks: Looks) -> dict[str, Tensor]:
    """The values that a formula of columns reads, float32 [key-value heads, 1, keys], by name.

    Raises:
        StatisticsError: a feature looks at what was not measured.
    """
    return {
        name: _function(name)(
            **{one: VALUES[one](attended, looks) for one in FEATURES[name].inputs}
        )
        .float()
        .expand(attended.keys.shape[:2])[:, None]
        for name in names
    }


@functools.cache
def _function(name: str) -> Callable[..., Tensor]:
    row = FEATURES[name]
    return function_of(row.inputs, [f"return {row.torch}"])


def _ages(attended: Attended, looks: Looks) -> Tensor:
    return attended.seen - 1 - attended.positions


def _window_attention(attended: Attended, looks: Looks) -> Tensor:
    """The mean over the last queries, pooled among the keys before them, with zeros at the ends."""
    count = attended.queries.shape[1]
    window = min(looks.window, count)
    mean = attended.attention(count - window, count).mean(1)
    before = mean[:, : max(mean.shape[1] - window, 0)]
    if looks.pool == 1 or not before.shape[1]:
        return mean
    pooled = avg_pool1d(before[:, None], looks.pool, stride=1, padding=looks.pool // 2)[:, 0]
    return torch.cat([pooled, mean[:, before.shape[1] :]], 1)


def _last_attention(attended: Attended, looks: Looks) -> Tensor:
    count = attended.queries.shape[1]
    return attended.attention(count - 1, count)[:, 0]


def _output_norms(attended: Attended, looks: Looks) -> Tensor:
    """L1 norms of W_o v, the mean over the query heads that read a key-value head."""
    if attended.writer is None:
        raise StatisticsError(
            f"feature VON looks at the output projection of layer {attended.layer}, which is not "
            "known here; use another formula"
        )
    heads, (groups, _, width) = len(attended.queries), attended.values.shape
    parts = attended.writer.float().view(-1, heads, width)
    norms = [
        torch.stack(
            [
                (values @ parts[:, head].T).abs().sum(-1)
                for head in range(group * heads // groups, (group + 1) * heads // groups)
            ]
        ).mean(0)
        for group, values in enumerate(attended.values)
    ]
    return torch.stack(norms)


def _query_mean(attended: Attended, looks: Looks) -> Tensor:
    """[key-value heads, group, width], scaled as products with keys are."""
    known = _known(
        attended, attended.measured.query_mean, "EXPECTED", "how queries are distributed"
    )
    return known.view(len(attended.keys), -1, known.shape[-1]) * attended.scaling


def _query_covariance(attended: Attended, looks: Looks) -> Tensor:
    """[key-value heads, group, width, width], scaled twice."""
    known = attended.measured.query_covariance
    known = _known(attended, known, "EXPECTED", "how queries are distributed")
    return known.view(len(attended.keys), -1, *known.shape[-2:]) * attended.scaling**2


def _next_attention(attended: Attended, looks: Looks) -> Tensor:
    known = attended.measured.next_attention
    return _known(attended, known, "ATT_NEXT", "the tokens that follow")


def _reread_attention(attended: Attended, looks: Looks) -> Tensor:
    known = attended.measured.reread_attention
    return _known(attended, known, "ATT_READ", "the text when it is read once more")


def _streaming_error(attended: Attended, looks: Looks) -> Tensor:
    """[key-value heads, 1]: the same of all keys of a head."""
    known = attended.measured.streaming_error
    return _known(attended, known, "STREAM", "how heads stream on calibration text")[:, None]


def _known(attended: Attended, value: Tensor | None, name: str, what: str) -> Tensor:
    if value is None:
        raise StatisticsError(
            f"feature {name} looks at {what}, which was not measured for layer {attended.layer}; "
            "measure it before, or use another formula"
        )
    return value.to(attended.keys.device)


def _lag(states: Tensor, looks: Looks) -> Tensor:
    """How much channels differ once scaled by the next chunk, a softmax over each chunk.

    Args:
        states: keys or values [key-value heads, keys, width].

    Tokens of the last whole chunk and behind it have no next one, and the value 1.

    Source: Liang et al. 2025, LagKV, arXiv:2504.04704, equations 3 to 7.
    """
    heads, keys, width = states.shape
    chunks = keys // looks.lag
    found = torch.ones(heads, keys, device=states.device)
    if chunks < 2:
        return found
    cut = states[:, : chunks * looks.lag].view(heads, chunks, looks.lag, width)
    lowest, highest = cut[:, 1:].amin(2, keepdim=True), cut[:, 1:].amax(2, keepdim=True)
    span = torch.where(highest > lowest, highest - lowest, torch.inf)
    scaled = (cut[:, :-1] - lowest) / span
    spread = scaled.std(-1).softmax(-1)
    found[:, : (chunks - 1) * looks.lag] = spread.reshape(heads, -1)
    return found


def _noise(attended: Attended, looks: Looks) -> Tensor:
    """Numbers by layer, head and token, which a key keeps as long as it is there."""
    generator = torch.Generator().manual_seed(zlib.crc32(b"%d" % attended.layer, looks.seed))
    tokens = torch.rand(attended.seen, len(attended.keys), generator=generator)
    return tokens.T.to(attended.keys.device).gather(1, attended.positions)


VALUES: dict[str, Value] = {
    "keys": lambda attended, looks: attended.keys,
    "values": lambda attended, looks: attended.values,
    "positions": lambda attended, looks: attended.positions,
    "ages": _ages,
    "column_noise": _noise,
    "output_norms": _output_norms,
    "window_attention": _window_attention,
    "last_attention": _last_attention,
    "attention_sum": lambda attended, looks: attended.totals[0],
    "attention_max": lambda attended, looks: attended.totals[1],
    "next_attention": _next_attention,
    "reread_attention": _reread_attention,
    "streaming_error": _streaming_error,
    "query_mean": _query_mean,
    "query_covariance": _query_covariance,
    "key_lag": lambda attended, looks: _lag(attended.keys, looks),
    "value_lag": lambda attended, looks: _lag(attended.values, looks),
}
"""By name in the torch text of a feature: what it is of, [key-value heads, keys] where not said."""
