"""Sums over the dense model that stay on disk: in memory are those of one block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from prunezero.models.anatomy.linears import Linear, by_block
from prunezero.models.observing.statistics_cache import read_block
from prunezero.scoring.statistics import Statistics


class StatisticsOnDisk(Mapping[str, Statistics]):
    """Statistics by layer name, each block read from its files when one of its layers is asked for.

    Another block takes its place, so whoever goes through the layers in their order reads every
    file once, and holds one block. What is derived from sums is forgotten with them.
    """

    def __init__(self, folder: Path, layers: Sequence[Linear], names: frozenset[str]) -> None:
        """Nothing is read yet.

        Args:
            folder: of the cache, with the named sums of all layers, see `statistics_cache.py`.
        """
        self._folder, self._names = folder, names
        self._blocks = by_block(layers)
        self._block_of = {layer.name: layer.block for layer in layers}
        self._at: int | None = None
        self._held: dict[str, Statistics] = {}

    def __getitem__(self, name: str) -> Statistics:
        """The sums of a layer, every bit as it was written.

        Raises:
            KeyError: it is none of the layers.
            StatisticsError: the file was damaged or deleted since.
        """
        block = self._block_of[name]
        if block != self._at:
            # The block before goes before the next one comes.
            self._at, self._held = None, {}
            self._held = read_block(self._folder, self._blocks[block], self._names)
            self._at = block
        return self._held[name]

    def __contains__(self, name: object) -> bool:
        """Whether it is the name of a layer; nothing is read."""
        return name in self._block_of

    def __iter__(self) -> Iterator[str]:
        """Names of the layers, in their order."""
        return iter(self._block_of)

    def __len__(self) -> int:
        """How many layers there are."""
        return len(self._block_of)
