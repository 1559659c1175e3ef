"""MemoryPlan: how much memory will comparing recipes take, or a search, told by shapes alone?

One formula for whoever asks before buying a machine, and for the statement before the work. The
work passes through phases, each of which holds some things at the same time; the largest phase
counts. What is held in memory by itself, and what with a memory limit, differs in three things:
sums over calibration text are those of one block, gradient sums those of as many blocks as the
limit leaves room for, and no copy of the dense weights is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from prunezero.errors import ModelError, RecipeError
from prunezero.files.places import mebibytes
from prunezero.models.anatomy.linears import Linear, by_block, find_blocks, find_linears
from prunezero.models.evaluation import CHUNK
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.block_trace import BlockTrace, trace_block
from prunezero.models.observing.walk import FORWARD_SUMS
from prunezero.models.streaming.memory import (
    FACTOR_BYTES,
    SCORING_BYTES,
    SPARE_BYTES,
    block_need,
)
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.staged import AnyRecipe
from prunezero.pruning.requirements import dense_sums, layer_sums
from prunezero.pruning.streamed import checked_sums
from prunezero.pruning.testbed import Settings
from prunezero.scoring.statistics import sums_bytes

# Where all layers compete: of each weight score and mask, and on a CPU all scores once more.
RANKING_BYTES, RANKING_BYTES_CPU = 6, 10
# What allocators keep of freed memory, as a share of what is used.
SPARE = 0.1
# Of each logit while a model is measured beside the dense one: both, their logarithms and chances.
MEASURING_COPIES = 6
# And for a gradient of the loss: logits in float32, log chances, and the gradients of both.
LOSS_COPIES = 4


@dataclass(frozen=True)
class Phase:
    """What is in memory at the same time."""

    what: str
    """is done meanwhile, such as "pruning" """
    parts: Mapping[str, int]
    """bytes, by what takes them"""

    @property
    def total(self) -> int:
        """Bytes of all."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        """Its parts, the largest first."""
        by_size = sorted(self.parts.items(), key=lambda part: -part[1])
        return ", ".join(f"{what} {mebibytes(size)}" for what, size in by_size if size)


@dataclass(frozen=True)
class MemoryPlan:
    """Memory that the work takes, phase by phase, estimated from shapes."""

    phases: tuple[Phase, ...]
    """in their order"""
    gradient_bytes: int | None = None
    """of gradient sums in memory together; None where all that is collected stays there"""
    passes: int = 1
    """of the text through the model for gradients"""
    disk_bytes: int = 0
    """of sums over calibration text in the cache"""

    @cached_property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def total(self) -> int:
        """Bytes that the work takes at most."""
        return self.peak.total

    def __str__(self) -> str:
        """One line: how much, when, and for what."""
        several = f", gradients in {self.passes} passes over the text" if self.passes > 1 else ""
        return f"{mebibytes(self.total)} of memory while {self.peak.what}: {self.peak}{several}"


@dataclass(frozen=True)
class Work:
    """What is done with a model, as far as its memory depends on it."""

    layers: Sequence[Linear]
    """that are pruned"""
    recipes: Sequence[Recipe]
    """that may prune it"""
    sums: frozenset[str]
    """collected of these layers"""
    settings: Settings
    """of the text"""
    answers: int
    """tokens on which the dense model's answers are kept"""
    again: frozenset[str] = frozenset()
    """sums collected once more, while the first ones are there"""
    draws: int = 1
    """of calibration text"""
    samples: int = 0
    """bytes of what is kept to look at recipes cheaply"""
    sampling: int = 0
    """bytes that making them takes for a while"""


def compare_plan(
    language_model: LanguageModel,
    recipes: Sequence[AnyRecipe],
    settings: Settings,
    *,
    is_sparing: bool = False,
    limit: int | None = None,
    with_rounding: bool = True,
) -> MemoryPlan:
    """The memory of comparing recipes: all in memory, the least that will do, or within a limit.

    Args:
        language_model: its weights may be outlines.
        settings: of the text.
        is_sparing: whether nothing is in memory that files can hold.
        limit: bytes, to be sparing within.
        with_rounding: whether recipes that mend weights prune twice.

    Raises:
        RecipeError: the memory of a recipe cannot be planned.
        ModelError: the limit is less than the least that it takes; `targets` match nothing.
    """
    planned = [refuse_unplanned(recipe) for recipe in recipes]
    layers: dict[str, Linear] = {}
    for recipe in planned:
        found = find_linears(language_model.model, targets=recipe.targets, ignore=recipe.ignore)
        layers |= {layer.name: layer for layer in found}
    twice = [dense_sums([recipe]) for recipe in planned if with_rounding and recipe.mends]
    work = Work(
        layers=list(layers.values()),
        recipes=planned,
        sums=dense_sums(planned),
        settings=settings,
        answers=settings.evaluation_tokens,
        again=max(twice, key=len, default=frozenset()),
    )
    return plan_of(language_model, work, is_sparing=is_sparing, limit=limit)


def plan_of(
    language_model: LanguageModel,
    work: Work,
    *,
    is_sparing: bool = False,
    limit: int | None = None,
) -> MemoryPlan:
    """The plan of some work on a model: all in memory, the least that will do, or within a limit.

    Args:
        is_sparing, limit: as `compare_plan`.

    Raises:
        ModelError: the limit is less than the least that it takes.
    """
    is_sparing = is_sparing or limit is not None
    sizes = _Sizes(language_model, work, is_sparing=is_sparing)
    if not is_sparing:
        return MemoryPlan(tuple(sizes.phases(sizes.gradients)), disk_bytes=sizes.on_disk)
    blocks = sizes.gradients_by_block
    block = max(blocks, default=0)
    least = MemoryPlan(
        tuple(sizes.phases(block)), block, passes_within(blocks, block), sizes.on_disk
    )
    if limit is None:
        return least
    if least.total > limit:
        raise ModelError(
            f"this takes at least {least} but the limit is {mebibytes(limit)}; "
            f"{mebibytes(least.total)} will do, or use fewer or shorter windows "
            "(--calibration-tokens, --sequence-length), or cheaper --signals or recipes"
        )
    room = 0
    if blocks:
        others = next(phase.total for phase in sizes.phases(0) if phase.what == _BACKWARD)
        room = min(sizes.gradients, max(int((limit - others) / (1 + SPARE)), *blocks))
    return MemoryPlan(tuple(sizes.phases(room)), room, passes_within(blocks, room), sizes.on_disk)


def streamed_bytes(language_model: LanguageModel, recipe: Recipe, settings: Settings) -> int:
    """Bytes that pruning takes from files to files, one block at a time, see `MemoryNeed`.

    Args:
        language_model: its weights may be outlines.
        settings: of the text.

    Raises:
        RecipeError: the recipe needs the whole model at once.
        ModelError: `targets` match nothing.
    """
    model, size = language_model.model, language_model.dtype.itemsize
    text = (
        max(1, settings.calibration_tokens // settings.sequence_length),
        settings.sequence_length,
    )
    sums = checked_sums(recipe, torch.zeros(text, dtype=torch.long))
    inside = [sum(one.numel() for one in block.parameters()) for block in find_blocks(model)]
    outside = sum(one.numel() for one in model.parameters()) - sum(inside)
    weights = size * outside, size * max(inside)
    layers = find_linears(model, targets=recipe.targets, ignore=recipe.ignore)
    return block_need(language_model, weights, layers, sums, text if sums else (0, 0)).total


def passes_within(blocks: Iterable[int], room: int) -> int:
    """How many passes over the text gradient sums take.

    Args:
        blocks: bytes of the sums of each block, in their order.
        room: bytes that a pass may hold, of one block at least.
    """
    passes, left = 0, 0
    for size in blocks:
        if not passes or size > left:
            passes, left = passes + 1, room
        left -= size
    return passes


def refuse_unplanned(recipe: AnyRecipe) -> Recipe:
    """The recipe, if all that it holds in memory is known beforehand.

    Raises:
        RecipeError: it trains, collects sums anew, or looks at the model in other ways.
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"recipe {recipe.name} has several stages, each of which collects sums of its own, so "
            "its memory is not planned; leave it out, or leave the memory limit out"
        )
    kind, allocate = recipe.unit.row, recipe.allocate
    faults = {
        f"recover {recipe.recover.word} trains": not recipe.recover.is_usual,
        f"schedule {recipe.schedule.word} goes through the model several times": (
            not recipe.schedule.is_usual
        ),
        f"permute {recipe.permute.word} keeps sums in another order": not recipe.permute.is_usual,
        f"allocate {allocate.word} looks at the model on trial": allocate.row.needs_text,
        f"unit {kind.word} is left out while a model runs": kind.domain.is_run_time,
        f"unit {kind.word} is seen by a walk of its own": bool(
            kind.walker or kind.observer or kind.domain.name == "expert"
        ),
    }
    found = [fault for fault, applies in faults.items() if applies]
    if found:
        raise RecipeError(
            f"the memory of recipe {recipe.name} is not planned: {'; '.join(found)}; leave it out, "
            "or leave the memory limit out"
        )
    return recipe


def _with_spare(phase: Phase) -> Phase:
    return Phase(phase.what, {**phase.parts, "spare": SPARE_BYTES + round(SPARE * phase.total)})


_BACKWARD = "collecting gradients"


class _Sizes:
    """Sizes of what some work on one model holds."""

    def __init__(self, language_model: LanguageModel, work: Work, *, is_sparing: bool) -> None:
        self._model = language_model
        self._work = work
        self._is_sparing = is_sparing
        self._size = language_model.dtype.itemsize
        self._is_cpu = language_model.device.type == "cpu"
        self._width = int(language_model.model.config.hidden_size)
        self._vocabulary = language_model.model.get_input_embeddings().weight.shape[0]
        self._sequences = max(1, work.settings.calibration_tokens // work.settings.sequence_length)
        self._every = find_linears(language_model.model)

    @cached_property
    def _trace(self) -> BlockTrace:
        return trace_block(self._model, self._work.settings.sequence_length)

    @cached_property
    def gradients_by_block(self) -> list[int]:
        """Bytes of gradient sums of each block, in their order; none where none are collected."""
        names = self._work.sums - FORWARD_SUMS
        return list(self._by_block(names).values()) if names else []

    @property
    def gradients(self) -> int:
        """Bytes of all gradient sums."""
        return sum(self.gradients_by_block)

    def phases(self, gradient_bytes: int) -> list[Phase]:
        """What is in memory in each phase.

        Args:
            gradient_bytes: of gradient sums together.
        """
        found = [Phase("loading", {"weights": self._weights, "files": self._files})]
        if self._work.sums & FORWARD_SUMS:
            found.append(Phase("collecting activations", self._forward()))
        if self.gradients_by_block:
            found.append(Phase(_BACKWARD, self._backward(gradient_bytes)))
        held = self._held()
        if self._work.sampling:
            making = {"samples in the making": self._work.sampling}
            found.append(Phase("sampling", held | making))
        found.append(Phase("pruning", held | self._pruning()))
        found.append(Phase("measuring", held | self._measuring()))
        return [_with_spare(phase) for phase in found]

    def _held(self) -> dict[str, int]:
        """What stays from the first pruning to the last."""
        work = self._work
        return {
            "weights": self._weights,
            "a copy of them": 0 if self._is_sparing else self._copied(self._every),
            "copies of experts": self._copied(self._stacked) if self._is_sparing else 0,
            "sums": self._sums_held,
            "answers of the dense model": (
                work.answers * self._width * self._size if self._is_cpu else 0
            ),
            "samples": work.samples,
        }

    @cached_property
    def _weights(self) -> int:
        model = self._model.model
        tensors = {id(one): one for one in (*model.parameters(), *model.buffers())}
        return sum(one.numel() * one.element_size() for one in tensors.values())

    @property
    def _files(self) -> int:
        """What is read of a checkpoint stays beside the weights until all is loaded."""
        source = self._model.source
        if not self._is_cpu:
            return 0
        return self._weights if source is None else source.shards.bytes

    @property
    def _stacked(self) -> list[Linear]:
        """Layers that files do not hold as the model does."""
        source = self._model.source
        if source is None:
            return [one for one in self._every if "expert" in one.name]
        return [one for one in self._every if f"{one.name}.weight" not in source.names]

    def _copied(self, layers: Iterable[Linear]) -> int:
        numbers = sum(
            one.weight.numel() + (0 if one.bias is None else one.bias.numel()) for one in layers
        )
        return numbers * self._size

    @property
    def on_disk(self) -> int:
        """Bytes of all sums over calibration text."""
        work = self._work
        return work.draws * (self._sums(work.sums) + self._sums(work.again))

    @cached_property
    def _sums_held(self) -> int:
        work = self._work
        if not self._is_sparing:
            return work.draws * self._sums(work.sums) + self._sums(work.again)
        # Of one block, for each text that sums are of.
        texts = work.draws + bool(work.again)
        return texts * max(self._by_block(work.sums).values(), default=0)

    def _sums(self, names: frozenset[str]) -> int:
        return sum(self._by_block(names).values())

    def _by_block(self, names: frozenset[str]) -> dict[int, int]:
        if not names:
            return {}
        return {
            block: sum(sums_bytes(names, one.weight.shape, self._sequences) for one in inside)
            for block, inside in by_block(self._work.layers).items()
        }

    def _forward(self) -> dict[str, int]:
        names = self._work.sums & FORWARD_SUMS
        blocks = self._by_block(names)
        sums = max(blocks.values()) if self._is_sparing else self._sums(names)
        written = max(max(self._by_block(frozenset({name})).values()) for name in names)
        return {
            "weights": self._weights,
            "sums": sums,
            # Copied for the file, of a block at a time.
            "sums on their way to the disk": written,
            "hidden states": self._states,
            "a block at work": self._trace.saved_bytes,
            "what a sequence adds": self._added(names),
        }

    @property
    def _states(self) -> int:
        return self._work.settings.calibration_tokens * self._width * self._size

    def _added(self, names: frozenset[str]) -> int:
        """By one sequence: its inputs in other dtypes, and a Gram matrix."""
        widest = max(one.weight.shape[1] for one in self._work.layers)
        matrix = 4 * widest**2 if "gram" in names else 0
        return matrix + self._work.settings.sequence_length * widest * (4 + 8 + 8)

    def _backward(self, gradient_bytes: int) -> dict[str, int]:
        names = self._work.sums - FORWARD_SUMS
        length = self._work.settings.sequence_length
        blocks = len(by_block(self._every))
        forward = self._sums(self._work.sums & FORWARD_SUMS)
        largest = max(self._work.layers, key=lambda one: one.weight.numel()).weight.numel()
        block = max(self._by_block(names).values())
        return {
            "weights": self._weights,
            "sums": gradient_bytes + (0 if self._is_sparing else forward),
            "sums on their way to the disk": block // len(names),
            # One more for gradients of what the block at work has computed.
            "what blocks remember": (blocks + 1) * self._trace.saved_bytes,
            "logits": length * self._vocabulary * (4 * LOSS_COPIES + 2 * self._size),
            "the gradient of a matrix": largest * (2 * self._size + 8),
        }

    def _pruning(self) -> dict[str, int]:
        work = self._work
        needed = frozenset[str]().union(*map(layer_sums, work.recipes), work.sums)
        largest = max(prod(one.weight.shape) for one in work.layers)
        widest = max(one.weight.shape[1] for one in work.layers)
        is_factored = "gram" in needed
        ranked = any(recipe.compare == "model" for recipe in work.recipes)
        numbers = sum(one.weight.numel() for one in work.layers)
        each = RANKING_BYTES_CPU if self._is_cpu else RANKING_BYTES
        return {
            "scores, masks and a factorization": (
                SCORING_BYTES * largest + FACTOR_BYTES * widest**2 * is_factored
            ),
            "scores of all layers": each * numbers if ranked else 0,
            **self._walking(needed),
        }

    def _walking(self, needed: frozenset[str]) -> dict[str, int]:
        """Of recipes that see the model as pruned so far."""
        if all(recipe.statistics == "dense" for recipe in self._work.recipes):
            return {}
        names = needed & FORWARD_SUMS
        return {
            "hidden states": self._states,
            "sums of the block at work": max(self._by_block(names).values(), default=0),
            "a block at work": self._trace.saved_bytes + (self._added(names) if names else 0),
        }

    def _measuring(self) -> dict[str, int]:
        length = self._work.settings.sequence_length
        logits = min(length, CHUNK) * self._vocabulary
        return {
            "logits": logits * (4 * MEASURING_COPIES + self._size),
            "a block at work": self._trace.saved_bytes,
        }
