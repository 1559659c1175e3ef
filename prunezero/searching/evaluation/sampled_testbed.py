"""SampledTestbed: what an evaluator holds of each model and draw of calibration text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prunezero.models.anatomy.linears import find_linears
from prunezero.models.observing.calibration import Progress
from prunezero.pruning.compare import RecipeRunner
from prunezero.pruning.testbed import Testbed
from prunezero.searching.experiment.task import Task
from prunezero.searching.proxies.samples import Stack, probe_of, sample_rows, stacked

# Numbers of a formula are tried on every third layer; a Llama block has seven kinds.
_TUNED_ON = 3


@dataclass(frozen=True)
class SampledTestbed:
    """One model under one draw of calibration text: to prune and measure on, and to look at."""

    runner: RecipeRunner
    """where it is pruned and measured"""
    samples: Sequence[Stack]
    """rows of every layer, for the layer error"""
    tuning_samples: Sequence[Stack]
    """those of some layers, for many layer errors"""
    probe: Sequence[Stack]
    """few rows of few layers, to tell masks apart"""

    @classmethod
    def of(
        cls,
        testbed: Testbed,
        sums: Iterable[str],
        task: Task,
        progress: Progress | None = None,
        *,
        runner: RecipeRunner | None = None,
    ) -> SampledTestbed:
        """Calibrate the model, or find its statistics where an earlier process left them.

        Args:
            sums: over calibration text, of every layer that is pruned.
            task: says which those are, what a formula may look at, and which may have one of their
                own.
            runner: of the same model under another draw of calibration text.

        Raises:
            TextError, StatisticsError: the text is too short, or nothing follows from it.
        """
        config, space = task.config, task.space
        layers = find_linears(
            testbed.language_model.model, targets=config.targets, ignore=config.ignore
        )
        statistics = testbed.statistics(layers, sums, progress)
        if runner is None:
            runner = RecipeRunner(testbed, statistics, splits=("search", "validation", "test"))
        else:
            runner = runner.redrawn(testbed, statistics)
        offered = [*space.choices.get("damping", ())]
        offered += [rule.choices["damping"] for rule in task.seeds if "damping" in rule.choices]
        samples = sample_rows(layers, statistics, space.features, dampings=offered)
        of_some = (samples, samples[::_TUNED_ON], probe_of(samples, kinds=space.criteria))
        return cls(runner, *map(stacked, of_some))
