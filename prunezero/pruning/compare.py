"""Recipes side by side: the same model, text, sparsity and kind of statistics for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prunezero.errors import ModelError
from prunezero.formula.feature_row import costliest
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.editing.biases import ClosedBiases
from prunezero.models.editing.expert_skipping import counting_calls
from prunezero.models.editing.selection import Selection
from prunezero.models.evaluation import Enough, dense_reference, evaluate
from prunezero.models.measures import TO_DENSE
from prunezero.models.observing.calibration import Progress
from prunezero.models.observing.subset_losses import mixture_of
from prunezero.pruning.by_source import perplexity_by_source, trained_by_source
from prunezero.pruning.costs import costs_without
from prunezero.pruning.outcome import Outcome
from prunezero.pruning.recipes.recipe import Recipe, with_patterns
from prunezero.pruning.recipes.staged import AnyRecipe, recipes_of
from prunezero.pruning.reordering import Reordering
from prunezero.pruning.requirements import dense_sums, settled_sparsity
from prunezero.pruning.staging import check_recipe, edit_of, prune
from prunezero.pruning.testbed import Testbed, beginning, with_choices
from prunezero.scoring.statistics import Statistics

SPLITS = ("validation", "test")
# A first look at a recipe: the first quarter of the search text, with the distance to the dense
# model, of which few tokens tell more than of perplexity.
# Called so in journals.
QUICK_KL = "glance"
# Texts on which all of `TO_DENSE` is told.
_WITH_DISTANCE = ("validation", QUICK_KL)


def dense_row(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a dense model, from what was measured on it."""
    head = {"recipe": "dense", "sparsity": 0.0, "pattern": "free", "statistics": "none"}
    tail = {"sparsity_reached": 0.0, "seconds": 0.0, "formula": "", "criteria": ""}
    tail |= {"complexity": None, "signal": None}
    return {**head, **measured, **tail, "compare": "", "allocate": "", "update": ""}


def pruned_row(recipe: AnyRecipe, outcome: Outcome, measured: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a pruned model, from how it was pruned and what was measured on it.

    Of a recipe of several stages a column tells the words of each in their order.
    """
    stages = recipes_of(recipe)
    formulas = [criterion for one in stages for criterion in one.formulas]
    own = recipe.criteria if isinstance(recipe, Recipe) else {}
    return {
        "recipe": recipe.name,
        "sparsity": outcome.sparsity,
        "pattern": recipe.pattern,
        "statistics": ", ".join(dict.fromkeys(one.statistics for one in stages)),
        **measured,
        **_removed(recipe, outcome),
        "seconds": outcome.seconds,
        "formula": recipe.criterion.text if isinstance(recipe, Recipe) else recipe.text,
        "criteria": "; ".join(with_patterns(own)),
        "complexity": sum(criterion.complexity for criterion in formulas),
        "signal": costliest(one.signal for one in formulas),
        "compare": recipe.compare,
        "allocate": ", then ".join(dict.fromkeys(one.allocate.text for one in stages)),
        "update": ", ".join(dict.fromkeys(word for one in stages for word in one.updates))
        or "none",
        **_trained(recipe, outcome),
        **layers_told(
            *(
                tuple(dict.fromkeys(word for one in stages for word in getattr(one, key)))
                for key in ("targets", "ignore")
            )
        ),
    }


def _removed(recipe: AnyRecipe, outcome: Outcome) -> dict[str, Any]:
    """What went, in columns: zeros among weights are one thing, units another."""
    if not outcome.selection.groups:
        return {"sparsity_reached": outcome.sparsity_reached}
    total, removed = outcome.selection.total(), outcome.selection.removed()
    whole = recipe.unit.several if isinstance(recipe, Recipe) else "all blocks"
    return {
        "sparsity_reached": None,
        "removed": outcome.sparsity_reached,
        "removed_of": f"{outcome.measure} of {whole}",
        "unit": recipe.unit.word,
        "units": round(total),
        "units_removed": round(removed),
    }


def _trained(recipe: AnyRecipe, outcome: Outcome) -> dict[str, Any]:
    """How some of the loss was won back, in columns; none where nothing was trained.

    Curves are lists of steps, over all trainings one after another, and means there.
    """
    words = [one.recover.text for one in recipes_of(recipe) if not one.recover.is_usual]
    if not words:
        return {}
    losses: list[tuple[int, float]] = []
    looks: list[tuple[int, float]] = []
    for training in outcome.trainings:
        begin = len(losses)
        losses += [(begin + at, loss) for at, loss in enumerate(training.losses, start=1)]
        looks += [(begin + at, loss) for at, loss in training.looks]
    told: dict[str, Any] = {"recover": ", then ".join(words)}
    told["training_losses"] = [point for point in losses if math.isfinite(point[1])]
    told["held_out_losses"] = [point for point in looks if math.isfinite(point[1])]
    told["steps_skipped"] = sum(len(training.skipped) for training in outcome.trainings)
    return told | trained_by_source(outcome.trainings)


def layers_told(targets: Sequence[str], ignore: Sequence[str]) -> dict[str, str]:
    """Columns of the patterns that choose layers; none where all are pruned."""
    told = {"targets": ", ".join(targets), "ignore": ", ".join(ignore)}
    return {key: patterns for key, patterns in told.items() if patterns}


class RecipeRunner:
    """Prunes the model on a testbed by one recipe after another, and measures what is left.

    The model is dense again after every measurement, also after one that failed or was stopped.
    """

    def __init__(
        self,
        testbed: Testbed,
        statistics: Mapping[str, Statistics],
        *,
        splits: Sequence[str] = SPLITS,
        also: str = "",
    ) -> None:
        """Keep the dense weights, and the dense model's answers on validation text.

        Args:
            splits: texts that rows may be asked for.
            also: one of `TO_DENSE` that is measured on every text, and kept for each window.

        Raises:
            TextError: a split is too short for the settings.
        """
        self.testbed = testbed
        self._statistics = statistics
        self._calibration = testbed.windows("calibration")
        self._sources = testbed.sources("calibration")
        self._windows = {split: testbed.windows(split) for split in splits}
        if "search" in self._windows:
            searched = self._windows["search"]
            self._windows[QUICK_KL] = searched[: max(1, len(searched) // 4)]
        self._references = {
            split: dense_reference(testbed.language_model, ids)
            for split, ids in self._windows.items()
            if also or split in _WITH_DISTANCE
        }
        self._also = also
        self._enough: Enough | None = None
        self.outcome: Outcome | None = None
        """of the last pruning"""
        # All layers: a permutation also moves rows of layers that a recipe does not prune.
        self._dense = testbed.dense_weights()

    def redrawn(self, testbed: Testbed, statistics: Mapping[str, Statistics]) -> RecipeRunner:
        """The stand of the same model and text under another draw of calibration text."""
        other = copy(self)
        other.testbed, other._statistics = testbed, statistics
        other._calibration = testbed.windows("calibration")
        other._sources = testbed.sources("calibration")
        return other

    def stopping(self, enough: Enough) -> RecipeRunner:
        """The same stand, which looks at no more windows of a text than `evaluate` does by this."""
        other = copy(self)
        other._enough = enough
        return other

    def dense_row(self, splits: Sequence[str], *, with_costs: bool = False) -> dict[str, Any]:
        """The row of the model before pruning, in the columns of `row`."""
        return dense_row(self._measured(splits) | (self._costs(Selection()) if with_costs else {}))

    def row(
        self,
        recipe: AnyRecipe,
        sparsity: float | None,
        splits: Sequence[str],
        *,
        keep: bool = False,
        with_costs: bool = False,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """One flat row: perplexity on each split, `TO_DENSE` on validation text or QUICK_KL.

        Args:
            keep: leave the model pruned, unless something failed.
            with_costs: count what the model takes without the units that go.
            folder: keeps finished steps of a pruning of several, see `prune`.
            progress: of the pruning.

        Raises:
            PruneZeroError: as `prune`.
        """
        tries = any(one.tries for one in recipes_of(recipe))
        with ExitStack() as edit:
            edit.enter_context(ClosedBiases(self.testbed.language_model.model))
            edit.enter_context(self._dense)
            self.outcome = outcome = prune(
                self.testbed.language_model,
                recipe,
                sparsity,
                statistics=self._statistics,
                windows=self._calibration,
                held_out=self.testbed.held_out if tries else None,
                sources=self._sources,
                folder=folder,
                progress=progress,
            )
            with self._without(recipe, outcome.selection):
                measured = self._measured(splits) | self._skipped(outcome.selection)
            if with_costs:
                measured |= self._costs(outcome.selection)
            if keep:
                # An edit that nobody leaves.
                edit.pop_all()
        return pruned_row(recipe, outcome, measured)

    def _without(self, recipe: AnyRecipe, selection: Selection) -> AbstractContextManager[None]:
        """Within it the pruned model computes as if units were gone, where zeros do not do it."""
        edit = edit_of(recipe)
        if edit.zeros_suffice:
            return nullcontext()
        return edit.simulated(self.testbed.language_model, selection)

    def _skipped(self, selection: Selection) -> dict[str, Any]:
        """Which share of all calls of experts tokens skip; none where they skip none."""
        skipping = [group for group in selection.groups if group.skip_below is not None]
        if not skipping:
            return {}
        with counting_calls(map(mixture_of, skipping)) as calls:
            evaluate(self.testbed.language_model, self.testbed.windows("validation"))
        return {"expert_calls_skipped": calls.share}

    def _costs(self, selection: Selection) -> dict[str, Any]:
        """What the model takes without the units that go, as columns; none where they cannot."""
        ids = self._calibration[:1]
        try:
            costs = asdict(costs_without(self.testbed.language_model, selection, ids))
        except ModelError:
            # Zeros were measured; that no smaller model can be made of it takes no row away.
            return {}
        # How long the window was is said where FLOPs are explained.
        return {key: costs[key] for key in costs if key != "context"}

    def reversed(self, recipe: AnyRecipe) -> RecipeRunner:
        """The stand of this recipe on the same calibration windows in the opposite order.

        Its sums are the same up to rounding, so what changes in a perplexity says nothing of the
        recipe. Collects the dense model's sums anew where the recipe looks at them.
        """
        testbed = self.testbed.reversed()
        # Later stages collect their own.
        first = recipes_of(recipe)[0]
        layers = find_linears(
            testbed.language_model.model, targets=first.targets, ignore=first.ignore
        )
        return self.redrawn(testbed, testbed.statistics(layers, dense_sums([first])))

    def _measured(self, splits: Sequence[str]) -> dict[str, Any]:
        settings = self.testbed.settings
        row: dict[str, Any] = {
            "seed": settings.seed,
            "calibration_tokens": self._calibration.numel(),
            "sequence_length": settings.sequence_length,
            **beginning([self.testbed.begin_with]),
            "window_losses": {},
        }
        for split in splits:
            result = evaluate(
                self.testbed.language_model,
                self._windows[split],
                reference=self._references.get(split),
                enough=self._enough,
            )
            row[f"{split}_perplexity"] = result.perplexity
            row["window_losses"][split] = list(result.window_losses)
            sources = self.testbed.text.sources(len(result.window_losses))
            if sources:
                by_source = perplexity_by_source(result.window_losses, sources)
                row[f"{split}_perplexity_by_source"] = by_source
            if split in _WITH_DISTANCE:
                row |= {key: getattr(result, key) for key in TO_DENSE}
            if self._also:
                row[f"{split}_{self._also}"] = getattr(result, self._also)
                windows = row.setdefault(f"window_{self._also}", {})
                windows[split] = list(result.windows[self._also])
        return row


def rounding(
    row: Mapping[str, Any], again: Mapping[str, Any], splits: Sequence[str], also: str = ""
) -> dict[str, float]:
    """By how much the perplexity on each split differs between two rows, as columns of results.

    Args:
        also: a measure of every split for which it is told as well.
    """
    keys = {f"{split}_rounding": f"{split}_perplexity" for split in splits}
    if also:
        keys |= {f"{split}_{also}_rounding": f"{split}_{also}" for split in splits}
    changes = {told: abs(row[key] - again[key]) for told, key in keys.items()}
    return {key: change for key, change in changes.items() if math.isfinite(change)}


def compare(
    testbed: Testbed,
    recipes: Sequence[AnyRecipe],
    sparsity: float | None = None,
    *,
    pattern: str | None = None,
    statistics: str = "dense",
    allocate: str | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    with_rounding: bool = True,
    with_costs: bool = False,
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure recipes one after another, the dense model first; yields one flat row for each.

    Columns: `recipe, sparsity, pattern, statistics, seed, calibration_tokens, sequence_length,
    sparsity_reached, validation_perplexity, test_perplexity, kl, top1_agreement, top5_agreement,
    acceptance, seconds`, `windows_begin_with` where the tokenizer does so by itself, and the
    formula, those of some layers, the words of all of them and the costliest signal they look at,
    their comparison group, allocation and updates, and where some layers are chosen, `targets` and
    `ignore`. Where units are removed, `sparsity_reached` is None; `removed` is the fraction of what
    `removed_of` says, and `unit`, `units` and `units_removed` stand beside it. Perplexity is exp of
    the mean nats per token, kl is in nats per token on validation text, the three behind it are
    shares of its tokens (`Evaluation`), seconds are those of pruning alone; `window_losses` holds
    the nats per token of each window by split, so that recipes can be compared in pairs.

    Args:
        pattern: for all recipes; None leaves each its own.
        statistics: "dense" or "sequential" for all recipes, so that a table never mixes them.
        allocate: a word for all recipes; None leaves each its own.
        targets: patterns of the layers to prune, as in `find_linears`; None leaves each its own.
        ignore: patterns of those to leave alone, likewise.
        with_rounding: prune by each recipe that mends weights once more, on the calibration windows
            in reverse order; columns `validation_rounding` and `test_rounding` say by how much
            that changes its perplexities. No smaller difference between two rows means anything.
        with_costs: columns of `Costs`, of the model without the units that go; always there where
            a recipe removes units.

    Raises:
        PruneZeroError: some recipe cannot be applied; raised before anything is measured.
    """
    choices = {"pattern": pattern, "statistics": statistics, "allocate": allocate}
    layers_chosen = {"targets": targets, "ignore": ignore}
    changed = [with_choices(recipe, **choices, **layers_chosen) for recipe in recipes]
    every = _checked(testbed, changed, sparsity)
    runner = RecipeRunner(
        testbed,
        testbed.statistics(every, dense_sums([recipes_of(one)[0] for one in changed]), progress),
    )
    counts = with_costs or any(not recipe.unit.is_usual for recipe in changed)
    yield runner.dense_row(SPLITS, with_costs=counts)
    for recipe in changed:
        row = runner.row(recipe, sparsity, SPLITS, with_costs=counts)
        if with_rounding and recipe.mends:
            row |= rounding(row, runner.reversed(recipe).row(recipe, sparsity, SPLITS), SPLITS)
        yield row


def _checked(
    testbed: Testbed, recipes: Sequence[AnyRecipe], sparsity: float | None
) -> list[Linear]:
    """The layers that the recipes prune, once it is sure that all can be applied."""
    layers: dict[str, Linear] = {}
    for recipe in recipes:
        fraction = settled_sparsity(recipe.pattern, sparsity)
        found = check_recipe(testbed.language_model, recipe, fraction)
        if isinstance(recipe, Recipe):
            # Refuses a permutation that cannot be had.
            Reordering(testbed.language_model, recipe, found)
        layers |= {layer.name: layer for layer in found}
    return list(layers.values())


def finite_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with None for numbers that are not finite, which JSON does not know."""
    return {key: _finite(value) for key, value in row.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return finite_row(value)
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
