"""`prunezero prune --memory-limit`: from files to files, with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunezero.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from prunezero.cli.tables import Bars
    from prunezero.models.anatomy.linears import Linear
    from prunezero.models.streaming.streamed_model import StreamedModel
    from prunezero.pruning.recipes.recipe import Recipe
    from prunezero.pruning.streamed import StreamedOutcome
    from prunezero.pruning.testbed import Settings, Testbed


def open_files(
    model: str, text: str, settings: Settings, *, dtype: str, device: str
) -> tuple[StreamedModel, Testbed]:
    """A model whose weights stay in their files, and the testbed that cuts text for it.

    Raises:
        ModelError: the name is that of no folder and no .gguf file, or its model is not readable.
        TextError: the text cannot be loaded.
    """
    from prunezero.models.loading.load import local_folder
    from prunezero.models.streaming.streamed_model import StreamedModel
    from prunezero.models.text.splits import load_text
    from prunezero.pruning.testbed import Testbed

    streamed = StreamedModel(local_folder(model), dtype=dtype, device=device, name=model)
    return streamed, Testbed(streamed.language_model, load_text(text), settings)


def prune_files(
    streamed: StreamedModel,
    testbed: Testbed,
    recipe: Recipe,
    sparsity: float,
    output: Path,
    limit: int,
) -> dict[str, Any]:
    """Prune into a new folder, measure both models, and print all of it; returns the pruned row.

    Args:
        sparsity: fraction to remove.
        output: new or empty; work that an earlier run left beside it is gone on with.
        limit: bytes; a larger estimate is refused.

    Raises:
        PruneZeroError: as `prune_streamed`.
    """
    from prunezero.cli.tables import Bars, console, results_table, say, say_about, say_conditions
    from prunezero.files.places import check_room
    from prunezero.models.streaming.memory import PeakMemory
    from prunezero.pruning.compare import SPLITS
    from prunezero.pruning.requirements import check_recipe
    from prunezero.pruning.streamed import checked_sums, prune_streamed

    ids = testbed.windows("calibration")
    # Before anything that looks at the model as a whole.
    checked_sums(recipe, ids)
    with streamed.outlined():
        say_about([testbed])
        layers = check_recipe(testbed.language_model, recipe, sparsity)
    partial = output.absolute().with_name(f"{output.name}.partial")
    there = sum(path.stat().st_size for path in partial.rglob("*.safetensors"))
    check_room(output, max(0, streamed.shards.bytes - there), "the pruned model")
    measured = {split: testbed.windows(split) for split in SPLITS}
    measuring = _checked_estimates(streamed, recipe, layers, ids, measured, limit)
    peak = PeakMemory(testbed.language_model.device)
    with Bars() as bars:
        report = _Report(streamed, recipe, testbed, measured, ids.numel(), bars)
        try:
            done = prune_streamed(
                streamed,
                recipe,
                sparsity,
                output,
                windows=ids,
                memory_limit=limit,
                progress=bars,
                report=report,
            )
        except KeyboardInterrupt:
            say(f"finished blocks are kept beside {output}; the same command goes on there")
            raise
    name = testbed.language_model.name
    console.print(results_table(report.rows, f"{recipe.name} on {name}"))
    say_conditions(report.rows, name, [testbed])
    _tell(done, len(streamed.blocks), len(layers), limit, [peak.growth, measuring])
    memory = {"peak_bytes": done.peak_bytes, "estimated_bytes": done.need.total}
    return {**report.rows[-1], **memory, "blocks_before": done.blocks_before}


def _checked_estimates(
    streamed: StreamedModel,
    recipe: Recipe,
    layers: Sequence[Linear],
    ids: Tensor,
    measured: Mapping[str, Tensor],
    limit: int,
) -> int:
    """Bytes that measuring takes; what pruning takes is printed.

    Raises:
        ModelError: either takes more than the limit.
    """
    from prunezero.cli.tables import say
    from prunezero.models.streaming.evaluation import evaluation_bytes
    from prunezero.models.streaming.memory import mebibytes, memory_need
    from prunezero.pruning.requirements import layer_sums

    sums = layer_sums(recipe)
    need = memory_need(streamed, layers, sums, ids if sums else None)
    say(f"pruning takes about {mebibytes(need.total)} of memory: {need}")
    measuring = max(evaluation_bytes(streamed, windows) for windows in measured.values())
    # Found out only after hours of pruning, it would leave the files without a way to the end.
    enough = max(need.total, measuring)
    if enough > limit:
        raise ModelError(
            f"pruning '{streamed.language_model.name}' takes about {mebibytes(need.total)} and "
            f"measuring it {mebibytes(measuring)}, but the limit is {mebibytes(limit)}; "
            f"{mebibytes(enough)} will do, or use less text (--calibration-tokens) in shorter "
            "windows (--sequence-length)"
        )
    return measuring


def _tell(
    done: StreamedOutcome, blocks: int, layers: int, limit: int, measuring: Sequence[int]
) -> None:
    """The lines under the table; `measuring` is the highest use of all and the estimate of it."""
    from prunezero.cli.tables import say
    from prunezero.models.streaming.memory import mebibytes

    highest, estimate = map(mebibytes, measuring)
    if done.blocks_before:
        say(f"{done.blocks_before} of {blocks} blocks were there already, from an earlier run")
    say(
        f"peak memory: {mebibytes(done.peak_bytes)} for pruning (estimated "
        f"{mebibytes(done.need.total)}), {highest} with measuring (estimated {estimate}); the "
        f"limit is {mebibytes(limit)}"
    )
    say(
        f"saved to {done.folder}: {done.outcome.zeros} of {done.outcome.total} weights of {layers} "
        "layers are zero, counted from the files"
    )


@dataclass(frozen=True)
class _Report:
    """Measures the dense and the pruned files, once these are complete."""

    streamed: StreamedModel
    recipe: Recipe
    testbed: Testbed
    windows: Mapping[str, Tensor]
    calibration_tokens: int
    bars: Bars
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, done: StreamedOutcome) -> dict[str, str]:
        """The texts to put beside the weights; keeps the rows."""
        from prunezero.models.streaming.streamed_model import StreamedModel
        from prunezero.pruning.compare import dense_row, pruned_row
        from prunezero.report.export.saved_model import files_beside

        model = self.testbed.language_model
        pruned = StreamedModel(done.folder, dtype=model.dtype_word, device=str(model.device))
        self.rows.append(dense_row(self._measured(self.streamed, "dense")))
        measured = self._measured(pruned, "pruned")
        self.rows.append(pruned_row(self.recipe, done.outcome, measured))
        return files_beside(model, self.recipe, self.rows)

    def _measured(self, streamed: StreamedModel, kind: str) -> dict[str, Any]:
        from prunezero.models.measures import TO_DENSE
        from prunezero.models.streaming.evaluation import evaluate_streamed
        from prunezero.pruning.testbed import beginning

        settings = self.testbed.settings
        row: dict[str, Any] = {
            "seed": settings.seed,
            "calibration_tokens": self.calibration_tokens,
            "sequence_length": settings.sequence_length,
            **beginning([self.testbed.begin_with]),
            "window_losses": {},
        }
        for split, windows in self.windows.items():

            def tell(what: str, done: int, total: int, split: str = split) -> None:
                self.bars(f"{what}, {kind} model on {split} text", done, total)

            result = evaluate_streamed(streamed, windows, progress=tell)
            row[f"{split}_perplexity"] = result.perplexity
            row["window_losses"][split] = list(result.window_losses)
        # The distance to the dense model would need the hidden states of both at once.
        return row | dict.fromkeys(TO_DENSE)
