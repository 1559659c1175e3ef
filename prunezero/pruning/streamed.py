"""Streamed pruning of a model that does not fit into memory: block by block, files to files.

The loop of `prune`, with one block in memory at a time. Every block that is done is on the disk, so
a run that was stopped goes on behind the last of them, and ends with the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunezero.errors import ModelError, OutputError, RecipeError
from prunezero.models.anatomy.groups import weight_groups
from prunezero.models.anatomy.linears import Linear
from prunezero.models.observing.calibration import FORWARD_SUMS, BlockWalk, Progress
from prunezero.models.observing.expert_calls import warn_of_scarce
from prunezero.models.saving.resumable import ResumableCheckpoint
from prunezero.models.saving.save import count_sparsity, stored_layers
from prunezero.models.streaming.memory import MemoryNeed, PeakMemory, mebibytes, memory_need
from prunezero.models.streaming.streamed_model import StreamedModel
from prunezero.models.text.windows import check_windows, windows_fingerprint
from prunezero.pruning.allocation import Evidence
from prunezero.pruning.outcome import Outcome, check_reached
from prunezero.pruning.prune import prune_layers, settle
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import check_recipe, layer_sums, settled_sparsity
from prunezero.scoring.statistics import Statistics

# What a report puts beside the weights; files of the source with these names are put aside.
FILES_BESIDE = ("README.md", "recipe.yaml", "report.json")


@dataclass(frozen=True)
class StreamedOutcome:
    """What pruning block by block did."""

    outcome: Outcome
    """zeros are counted in the files; the seconds are those of this run"""
    folder: Path
    """the pruned checkpoint"""
    need: MemoryNeed
    """what was estimated beforehand"""
    peak_bytes: int
    """growth of the memory in use, see `PeakMemory`"""
    blocks_before: int
    """blocks that an earlier run had finished"""


# Told what was done, in a folder that is complete but for this: more text files, by file name.
Report = Callable[[StreamedOutcome], Mapping[str, str]]


def prune_streamed(
    source: str | Path | StreamedModel,
    recipe: Recipe,
    sparsity: float | None,
    output: str | Path,
    *,
    windows: Tensor | None = None,
    memory_limit: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
    report: Report | None = None,
) -> StreamedOutcome:
    """Prune a checkpoint folder into a new one, with one block in memory at a time.

    The work is done in `OUTPUT.partial`; after an interruption the same call goes on there.

    Args:
        source: folder of safetensors, or a `StreamedModel` of it, whose `language_model` cuts
            calibration windows.
        recipe: forward sums only, without schedule, recovery and permutation.
        sparsity: fraction to remove; may be None with an N:M pattern.
        output: folder that is new or empty; it appears complete or not at all.
        windows: calibration token ids [count, length], where the recipe looks at inputs.
        memory_limit: bytes; a larger `MemoryNeed` is refused before weights are read.
        dtype: see `StreamedModel`; the files keep the dtype that they have in the source.
        device: where blocks work.
        progress: told (what, done, total) as the work goes on.
        report: may measure the pruned checkpoint before it appears, and say what to put beside it.

    Raises:
        RecipeError: a choice that needs the whole model at once.
        ModelError: the source cannot be read, or more memory is needed than the limit allows.
        OutputError: the output cannot be written, or was begun under another request.
        TextError, SelectionError, ScoreError, StatisticsError: as `prune`.
    """
    begin = time.perf_counter()
    fraction = settled_sparsity(recipe.pattern, sparsity)
    sums = checked_sums(recipe, windows)
    streamed = source
    if not isinstance(streamed, StreamedModel):
        streamed = StreamedModel(streamed, dtype=dtype, device=device)
    peak = PeakMemory(streamed.language_model.device)
    plan = _planned(streamed, recipe, fraction, sums, windows if sums else None)
    need = memory_need(streamed, plan.layers, sums, plan.windows)
    _refuse_too_large(need, memory_limit, streamed.language_model.name)
    checkpoint = ResumableCheckpoint(output, _request(plan), streamed.shards)
    blocks_before = _Job(plan, checkpoint).run(progress or (lambda what, done, total: None))
    ours = ("recipe.yaml",) if report is None else FILES_BESIDE
    outcome = _finish(plan, checkpoint, begin, ours)
    folder = checkpoint.model_folder
    result = StreamedOutcome(outcome, folder, need, peak.growth, blocks_before)
    if report is not None:
        checkpoint.add_files(report(result))
    return replace(result, folder=checkpoint.publish())


@dataclass(frozen=True)
class _Plan:
    """What is to be done, once nothing speaks against it."""

    streamed: StreamedModel
    recipe: Recipe
    sparsity: float
    layers: list[Linear]
    ratios: Mapping[str, float]
    sums: frozenset[str]
    windows: Tensor | None


def _planned(
    streamed: StreamedModel,
    recipe: Recipe,
    sparsity: float,
    sums: frozenset[str],
    windows: Tensor | None,
) -> _Plan:
    with streamed.outlined():
        layers = check_recipe(streamed.language_model, recipe, sparsity)
    _refuse_new_biases(recipe, layers)
    if windows is not None:
        check_windows(windows, streamed.language_model)
    ratios = recipe.allocate.row.function(
        layers, sparsity, recipe.allocate.options, Evidence({}, None, None)
    )
    return _Plan(streamed, recipe, sparsity, layers, ratios, sums, windows)


@dataclass(frozen=True)
class _Job:
    plan: _Plan
    checkpoint: ResumableCheckpoint

    def run(self, tell: Progress) -> int:
        """Write what is missing of the files; how many blocks were there already."""
        finished = self.checkpoint.finished()
        streamed = self.plan.streamed
        total = len(streamed.blocks)
        # The first part is what is outside the blocks.
        if finished == 0:
            self.checkpoint.copy(streamed.names_outside())
        first = max(0, finished - 1)
        walk = self._walk() if first <= self._last else None
        if walk is not None:
            self._catch_up(walk, first, tell)
        for index in range(first, total):
            with streamed.block(index):
                self._prune_block(index, walk if index <= self._last else None)
            tell("blocks pruned", index + 1, total)
        if walk is not None:
            warn_of_scarce(walk.scarce)
        return first

    @property
    def _last(self) -> int:
        """The last block with a layer to prune; nobody asks for the hidden states behind it."""
        return max(layer.block for layer in self.plan.layers)

    def _walk(self) -> BlockWalk | None:
        if self.plan.windows is None:
            return None
        streamed = self.plan.streamed
        with streamed.outside(), streamed.block(0):
            return BlockWalk(
                streamed.language_model,
                self.plan.windows,
                states_device=torch.device("cpu"),
            )

    def _catch_up(self, walk: BlockWalk, first: int, tell: Progress) -> None:
        """Take the text through the blocks that are finished, as it went when they were."""
        is_dense = self.plan.recipe.statistics == "dense"
        for index in range(first):
            source = None if is_dense else self.checkpoint.shards()
            with self.plan.streamed.block(index, source):
                walk.advance(index)
            tell("text taken through blocks pruned earlier", index + 1, first)

    def _prune_block(self, index: int, walk: BlockWalk | None) -> None:
        plan = self.plan
        inside = [layer for layer in plan.layers if layer.block == index]
        is_dense = plan.recipe.statistics == "dense"
        moves = walk is not None and index < self._last
        known: dict[str, Statistics] = {}
        if walk is not None and is_dense and moves:
            known = walk.observe_and_advance(index, inside, plan.sums)
        elif walk is not None and inside:
            known = walk.observe(index, inside, plan.sums)
        prune_layers(plan.recipe, inside, known, plan.ratios)
        settle(plan.streamed.language_model, inside)
        self.checkpoint.write(index + 1, plan.streamed.stored_block(index))
        if walk is not None and moves and not is_dense:
            walk.advance(index)


def checked_sums(recipe: Recipe, windows: Tensor | None) -> frozenset[str]:
    """The sums to collect, once it is sure that one block at a time is enough for the recipe.

    Raises:
        RecipeError: a choice needs the whole model at once, or there is no text to look at.
    """
    sums = layer_sums(recipe)
    faults = {
        "its formula takes gradients, which pass through all blocks": bool(sums - FORWARD_SUMS),
        "compare 'model' ranks the weights of all blocks together": recipe.compare == "model",
    }
    found = [fault for fault, applies in faults.items() if applies]
    if recipe.unit.row.whole_model:
        found.append(f"unit {recipe.unit.word} {recipe.unit.row.whole_model}")
    for choice in recipe.choices:
        if choice.row.whole_model:
            found.append(f"{choice.arrow} {choice.word} {choice.row.whole_model}")
    if found:
        raise RecipeError(
            f"recipe {recipe.name} cannot be run block by block: {'; '.join(found)}; choose "
            "another recipe, or leave out the memory limit"
        )
    if sums and windows is None:
        raise RecipeError(f"recipe {recipe.name} looks at inputs, so it needs calibration text")
    return sums


def _refuse_new_biases(recipe: Recipe, layers: list[Linear]) -> None:
    without = [layer.name for layer in layers if layer.bias is None]
    if recipe.needs_biases and without:
        raise RecipeError(
            f"recipe {recipe.name} updates biases but layer '{without[0]}' has none, and a file "
            "cannot get one block by block; choose another update, or prune the model in memory"
        )


def _refuse_too_large(need: MemoryNeed, limit: int | None, name: str) -> None:
    if limit is not None and need.total > limit:
        raise ModelError(
            f"pruning '{name}' block by block takes about {mebibytes(need.total)} ({need}) but the "
            f"limit is {mebibytes(limit)}; raise it, use fewer or shorter calibration windows, or "
            "a recipe that needs smaller statistics"
        )


def _request(plan: _Plan) -> dict[str, Any]:
    """All that the bytes of the result depend on."""
    model = plan.streamed.language_model
    return {
        "recipe": plan.recipe.to_yaml(),
        "sparsity": plan.sparsity,
        "source": model.fingerprint,
        "windows": None if plan.windows is None else windows_fingerprint(plan.windows),
        "dtype": str(model.dtype),
        "device": model.device.type,
        "versions": {name: version(name) for name in ("prunezero", "torch", "transformers")},
    }


def _finish(
    plan: _Plan, checkpoint: ResumableCheckpoint, begin: float, ours: Collection[str]
) -> Outcome:
    """Complete the folder, and count in its files what was reached."""
    recipe = plan.recipe
    folder = checkpoint.complete(plan.streamed.folder, ours=ours)
    checkpoint.add_files({"recipe.yaml": recipe.to_yaml()})
    names = stored_layers(plan.streamed.language_model, plan.layers, folder)
    saved = count_sparsity(folder, names)
    if saved.negative_zeros:
        raise OutputError(
            f"{folder} holds {saved.negative_zeros} negative zeros; please report this"
        )
    seconds = time.perf_counter() - begin
    outcome = Outcome(plan.sparsity, recipe.pattern, saved.zeros, saved.total, seconds)
    groups = weight_groups(plan.layers)
    check_reached(outcome, recipe, groups, plan.ratios)
    return outcome
