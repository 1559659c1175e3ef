"""What do the layers of the dense model see while sample text runs through it?

Sums that need no gradients come from a walk over the blocks, gradient sums from one backward pass
per sequence. Both are kept on disk, so a second run over the same model and text collects nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import Tensor

from prunezero.errors import PruneZeroWarning, StatisticsError, did_you_mean, reason
from prunezero.models.anatomy.linears import Linear
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.expert_calls import warn_of_scarce
from prunezero.models.observing.gradients import gradient_statistics
from prunezero.models.observing.statistics_cache import (
    cache_folder,
    limit_size,
    read_sums,
    write_sums,
)
from prunezero.models.observing.walk import FORWARD_SUMS, BlockWalk
from prunezero.models.text.windows import check_windows
from prunezero.scoring.statistics import SUMS, Statistics

__all__ = ["FORWARD_SUMS", "BlockWalk", "Progress", "calibrate"]

# Told what is being done, how much of it is done, and the total.
Progress = Callable[[str, int, int], None]


def calibrate(
    language_model: LanguageModel,
    batches: Tensor,
    layers: Sequence[Linear],
    sums: Iterable[str],
    *,
    cache: Path | None = None,
    text_fingerprint: str = "",
    progress: Progress | None = None,
) -> dict[str, Statistics]:
    """Statistics of the dense model, by layer name.

    Args:
        language_model: dense, and unchanged since it was loaded: its fingerprint names the cache.
        batches: token ids [count, length].
        layers: whose sums to collect.
        sums: names in `SUMS`; none collects nothing.
        cache: folder that keeps the sums for the next run; None keeps nothing.
        text_fingerprint: of the text that the ids come from.
        progress: told (what, done, total) as the work goes on.

    Raises:
        TextError: the model cannot be run on these ids.
        StatisticsError: unknown sum, numbers that are not finite, all-zero gradients, a layer that
            saw no token, or a cache file of another model.
    """
    names = _known(sums)
    check_windows(batches, language_model)
    tell = progress or (lambda what, done, total: None)
    folder = None
    if cache is not None and names:
        folder = cache_folder(cache, language_model, batches, layers, text_fingerprint)
    found = {} if folder is None else read_sums(folder, layers, names)
    parts, missing = list(found.values()), names - found.keys()
    # Whoever reads sums that were filled up is told as whoever collects them.
    scarce = {name: None for part in parts for name, one in part.items() if one.is_filled}
    for collect, wanted in (
        (_forward_statistics, missing & FORWARD_SUMS),
        (_gradient_statistics, missing - FORWARD_SUMS),
    ):
        if wanted:
            collected, found_scarce = collect(language_model, batches, layers, wanted, tell)
            scarce |= dict.fromkeys(found_scarce)
            if folder is not None:
                _keep(folder, collected, wanted, tell)
            parts.append(collected)
    warn_of_scarce([layer.name for layer in layers if layer.name in scarce])
    if folder is not None and missing and folder.is_dir():
        limit_size(folder)
    return {layer.name: _joined([part[layer.name] for part in parts]) for layer in layers}


def _known(sums: Iterable[str]) -> frozenset[str]:
    names = frozenset(sums)
    for name in sorted(names):
        if name not in SUMS:
            raise StatisticsError(
                f"'{name}' is not a sum that can be collected{did_you_mean(name, SUMS)}; "
                f"known sums: {', '.join(SUMS)}"
            )
    return names


def _forward_statistics(
    language_model: LanguageModel,
    batches: Tensor,
    layers: Sequence[Linear],
    sums: frozenset[str],
    tell: Progress,
) -> tuple[dict[str, Statistics], list[str]]:
    walk = BlockWalk(language_model, batches)
    collected: dict[str, Statistics] = {}
    # Blocks behind the last layer have nothing to say.
    total = 1 + max(layer.block for layer in layers)
    for index in range(total):
        collected |= walk.observe_and_advance(index, layers, sums)
        tell("activations of block", index + 1, total)
    return collected, walk.scarce


def _gradient_statistics(
    language_model: LanguageModel,
    batches: Tensor,
    layers: Sequence[Linear],
    sums: frozenset[str],
    tell: Progress,
) -> tuple[dict[str, Statistics], list[str]]:
    def told(done: int, total: int) -> None:
        tell("gradients of sequence", done, total)

    return gradient_statistics(language_model, batches, layers, sums, progress=told)


def _keep(
    folder: Path, collected: dict[str, Statistics], names: frozenset[str], tell: Progress
) -> None:
    """Write sums for the next run; where the disk is full or read-only, it computes them again."""
    from safetensors import SafetensorError

    for done, name in enumerate(sorted(names), start=1):
        try:
            write_sums(folder, collected, frozenset({name}))
        except (OSError, SafetensorError) as error:
            warnings.warn(
                f"calibration sums are not kept in {folder}: {reason(error, folder)}",
                PruneZeroWarning,
                stacklevel=3,
            )
            return
        tell("sums kept on disk", done, len(names))


def _joined(parts: list[Statistics]) -> Statistics:
    """One layer's sums of several passes over the same text."""
    sums: dict[str, Tensor] = {}
    for part in parts:
        sums |= part.sums
    tokens = max((part.tokens for part in parts), default=0)
    sequences = max((part.sequences for part in parts), default=0)
    filled = any(part.is_filled for part in parts)
    return Statistics(tokens, sequences, sums, is_filled=filled)
