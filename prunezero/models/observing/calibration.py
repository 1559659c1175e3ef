"""What do the layers of the dense model see while sample text runs through it?

Sums that need no gradients come from a walk over the blocks, gradient sums from one backward pass
per sequence. Both are kept on disk, so a second run over the same model and text collects nothing;
and where memory is short, they stay there (`statistics_on_disk.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from prunezero.errors import PruneZeroWarning, StatisticsError, did_you_mean, reason
from prunezero.files.places import check_room
from prunezero.models.anatomy.linears import Linear, by_block
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.expert_calls import warn_of_scarce
from prunezero.models.observing.gradients import Keep, gradient_statistics
from prunezero.models.observing.statistics_cache import (
    cache_folder,
    joined,
    limit_size,
    read_sums,
    whole_sums,
    write_sums,
)
from prunezero.models.observing.statistics_on_disk import StatisticsOnDisk
from prunezero.models.observing.walk import FORWARD_SUMS, BlockWalk
from prunezero.models.text.windows import check_windows
from prunezero.scoring.statistics import SUMS, Statistics, sums_bytes

__all__ = [
    "FORWARD_SUMS",
    "BlockWalk",
    "Progress",
    "calibrate",
    "calibrate_on_disk",
    "groups_within",
]

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
    scarce = {name for part in parts for name, one in part.items() if one.is_filled}
    work = _Work(language_model, batches, layers, tell)
    for wanted in _passes(missing):
        collected: dict[str, Statistics] = {}
        work.collect(wanted, partial(_gather, collected))
        if folder is not None:
            _keep(folder, layers, collected, wanted, tell)
        parts.append(collected)
    _warn_of_scarce(layers, scarce | work.scarce.keys())
    if folder is not None and missing and folder.is_dir():
        limit_size(folder)
    return {layer.name: joined([part[layer.name] for part in parts]) for layer in layers}


def calibrate_on_disk(
    language_model: LanguageModel,
    batches: Tensor,
    layers: Sequence[Linear],
    sums: Iterable[str],
    *,
    cache: Path,
    gradient_bytes: int,
    text_fingerprint: str = "",
    progress: Progress | None = None,
) -> StatisticsOnDisk:
    """What `calibrate` gives, to the last bit, with the sums of one block at a time in memory.

    They are written to the cache block by block as they are collected, and read from there.

    Args:
        language_model, batches, layers, sums, text_fingerprint, progress: as `calibrate`.
        cache: folder that keeps the sums; none of them is deleted for lack of room.
        gradient_bytes: of gradient sums that may be in memory together, those of the largest block
            at least. The text goes through the model once for each such part of its blocks.

    Raises:
        TextError, StatisticsError: as `calibrate`; or the cache cannot be written.
        OutputError: the disk of the cache has no room for sums that are not there yet.
    """
    names = _known(sums)
    check_windows(batches, language_model)
    tell = progress or (lambda what, done, total: None)
    folder = cache_folder(cache, language_model, batches, layers, text_fingerprint)
    work = _Work(language_model, batches, layers, tell)
    whole, scarce = whole_sums(folder, layers, names)
    missing = names - whole
    size = sum(sums_bytes(missing, one.weight.shape, len(batches)) for one in layers)
    check_room(folder, size if missing else 0, "what is seen of calibration text")
    for wanted in _passes(missing):
        work.collect(wanted, partial(_write, folder, wanted), gradient_bytes)
    _warn_of_scarce(layers, scarce | work.scarce.keys())
    return StatisticsOnDisk(folder, layers, names)


def _warn_of_scarce(layers: Sequence[Linear], scarce: Collection[str]) -> None:
    """Warn of experts whose sums were filled up, in the order of the model."""
    warn_of_scarce([layer.name for layer in layers if layer.name in scarce])


def _known(sums: Iterable[str]) -> frozenset[str]:
    names = frozenset(sums)
    for name in sorted(names):
        if name not in SUMS:
            raise StatisticsError(
                f"'{name}' is not a sum that can be collected{did_you_mean(name, SUMS)}; "
                f"known sums: {', '.join(SUMS)}"
            )
    return names


def _passes(missing: frozenset[str]) -> list[frozenset[str]]:
    """Names of sums that are collected together: those of a walk, and those of gradients."""
    return [names for names in (missing & FORWARD_SUMS, missing - FORWARD_SUMS) if names]


@dataclass(frozen=True)
class _Work:
    """The text and the layers that sums are collected of."""

    language_model: LanguageModel
    batches: Tensor
    layers: Sequence[Linear]
    tell: Progress
    scarce: dict[str, None] = field(default_factory=dict)
    """names of experts' matrices so far that saw too few tokens, see `fill_up`"""

    def collect(self, sums: frozenset[str], keep: Keep, gradient_bytes: int | None = None) -> None:
        """Collect the sums of one of `_passes`.

        Args:
            keep: given some layers with their sums by name, one part of the model after another.
            gradient_bytes: as `calibrate_on_disk`; None for all gradients at once.
        """
        collect = self._forward if sums <= FORWARD_SUMS else self._backward
        collect(sums, keep, gradient_bytes)

    def _forward(self, sums: frozenset[str], keep: Keep, _: int | None) -> None:
        walk = BlockWalk(self.language_model, self.batches)
        blocks = by_block(self.layers)
        # Blocks behind the last layer have nothing to say.
        total = 1 + max(blocks)
        for index in range(total):
            inside = blocks.get(index, [])
            keep(inside, walk.observe_and_advance(index, inside, sums))
            self.tell("activations of block", index + 1, total)
        self.scarce.update(dict.fromkeys(walk.scarce))

    def _backward(self, sums: frozenset[str], keep: Keep, gradient_bytes: int | None) -> None:
        def told(done: int, total: int) -> None:
            self.tell("gradients of sequence", done, total)

        groups = [list(self.layers)]
        if gradient_bytes is not None:
            groups = groups_within(self.layers, sums, len(self.batches), gradient_bytes)
        text = self.language_model, self.batches
        scarce = gradient_statistics(*text, groups, sums, keep, progress=told)
        self.scarce.update(dict.fromkeys(scarce))


def _gather(
    collected: dict[str, Statistics], layers: Sequence[Linear], part: dict[str, Statistics]
) -> None:
    """Keep sums in memory."""
    collected.update(part)


def _write(
    folder: Path,
    names: frozenset[str],
    layers: Sequence[Linear],
    collected: dict[str, Statistics],
) -> None:
    """Write sums that are read from there again.

    Raises:
        StatisticsError: they cannot be written.
    """
    from safetensors import SafetensorError

    try:
        write_sums(folder, layers, collected, names)
    except (OSError, SafetensorError) as error:
        raise StatisticsError(
            f"calibration sums cannot be kept in {folder} ({reason(error, folder)}), which a "
            "memory limit needs; free some space, or set PRUNEZERO_CACHE to another disk"
        ) from error


def groups_within(
    layers: Sequence[Linear], sums: frozenset[str], sequences: int, most_bytes: int
) -> list[list[Linear]]:
    """The layers of neighbouring blocks whose sums fit into memory together, at least one block.

    Args:
        sums: names of those that are collected together.
        sequences: of the text.
        most_bytes: of their sums.
    """
    groups: list[list[Linear]] = []
    room = 0
    for inside in by_block(layers).values():
        size = sum(sums_bytes(sums, layer.weight.shape, sequences) for layer in inside)
        if not groups or size > room:
            groups.append([])
            room = most_bytes
        groups[-1] += inside
        room -= size
    return groups


def _keep(
    folder: Path,
    layers: Sequence[Linear],
    collected: dict[str, Statistics],
    names: frozenset[str],
    tell: Progress,
) -> None:
    """Write sums for the next run; where the disk is full or read-only, it computes them again."""
    from safetensors import SafetensorError

    for done, name in enumerate(sorted(names), start=1):
        try:
            write_sums(folder, layers, collected, frozenset({name}))
        except (OSError, SafetensorError) as error:
            warnings.warn(
                f"calibration sums are not kept in {folder}: {reason(error, folder)}",
                PruneZeroWarning,
                stacklevel=3,
            )
            return
        tell("sums kept on disk", done, len(names))
