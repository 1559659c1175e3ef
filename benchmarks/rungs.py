"""What does each rung of the search cost, and how well does the layer error rank formulas?

    python benchmarks/rungs.py --formulas 16 --sparsity 0.5

Screens published and random formulas by the plain and by the gradient-weighted layer error,
takes the quick KL of all of them, measures them on search text, and prints seconds per candidate
and Kendall's tau of each cheap rung with perplexity.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import torch

from prunezero.errors import ScoreError
from prunezero.formula import Criterion
from prunezero.models.anatomy.linears import find_linears
from prunezero.pruning.compare import QUICK_KL, RecipeRunner
from prunezero.pruning.testbed import Settings, set_up
from prunezero.searching.evaluation.rung_correlation import kendall_tau
from prunezero.searching.experiment.config import SearchConfig
from prunezero.searching.proxies.layer_error import layer_error, mask_digest, masks_on
from prunezero.searching.proxies.samples import probe_of, rung_sums, sample_rows, stacked
from prunezero.searching.session import make_task
from prunezero.searching.spaces.space import SearchSpace
from prunezero.searching.strategies.genetics import random_criterion

Row = dict[str, float | str]


def main() -> None:
    """Measure, and print one row per formula and one line per rung."""
    arguments = parsed()
    ladder = Ladder(arguments)
    rng = random.Random(0)
    rows: list[Row] = []
    waiting = [seed.criterion for seed in ladder.task.seeds]
    while len(rows) < arguments.formulas:
        criterion = waiting.pop(0) if waiting else random_criterion(ladder.space, rng)
        row = None if criterion is None else ladder.climbed(criterion)
        if row is not None:
            rows.append(row)
            print(json.dumps(row), flush=True)
    tell(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formulas", type=int, default=16)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", default="free")
    parser.add_argument("--evaluation-tokens", type=int, default=2048)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


class Ladder:
    """The rungs of a search, which every formula climbs to the top."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        sizes = Settings(
            arguments.sequence_length, arguments.calibration_tokens, arguments.evaluation_tokens
        )
        testbed = set_up(arguments.model, arguments.text, sizes, dtype=arguments.dtype)
        self.space = SearchSpace.load("formulas")
        config = SearchConfig.on(
            testbed,
            space_content=self.space,
            sparsity=arguments.sparsity,
            pattern=arguments.pattern,
        )
        self.task = make_task(config)
        self._budget = self.task.budgets[0]
        layers = find_linears(testbed.language_model.model)
        sums = rung_sums(self.space.features, with_gradients=True)
        statistics = testbed.statistics(layers, sums)
        self._runner = RecipeRunner(testbed, statistics, splits=("search",))
        rows = sample_rows(layers, statistics, self.space.features)
        self._samples, self._probe = stacked(rows), stacked(probe_of(rows))
        self._plain = [
            replace(one, row_weights=torch.ones_like(one.row_weights)) for one in self._samples
        ]
        self._seen: set[str] = set()

    def climbed(self, criterion: Criterion) -> Row | None:
        """Seconds and figures of each rung; None for a duplicate or what nobody would measure."""
        recipe = self.task.recipe(criterion, "formula")
        choices = (self._budget.amount, self._budget.pattern)
        try:
            begin = time.perf_counter()
            digest = mask_digest(masks_on(self._probe, recipe, *choices))
            probed = time.perf_counter()
            masks = masks_on(self._samples, recipe, *choices)
            weighted = layer_error(self._samples, masks)
            screened = time.perf_counter()
        except ScoreError:
            return None
        if digest in self._seen or weighted > 0.5:
            return None
        self._seen.add(digest)
        quick = self._runner.row(recipe, self._budget.amount, (QUICK_KL,))
        compared = time.perf_counter()
        row = self._runner.row(recipe, self._budget.amount, ("search",))
        return {
            "formula": criterion.text,
            "perplexity": row["search_perplexity"],
            "kl": quick["kl"],
            "weighted_error": weighted,
            "plain_error": layer_error(self._plain, masks),
            "probe_seconds": probed - begin,
            "screen_seconds": screened - probed,
            "quick_kl_seconds": compared - screened,
            "measure_seconds": time.perf_counter() - compared,
        }


def tell(rows: list[Row]) -> None:
    """Print how well each cheap rung ranks, and what each costs."""
    perplexities = [float(row["perplexity"]) for row in rows]
    for key in ("weighted_error", "plain_error", "kl"):
        tau = kendall_tau([float(row[key]) for row in rows], perplexities)
        print(f"Kendall's tau of {key} with perplexity over {len(rows)} formulas: {tau:.2f}")
    for key in ("probe_seconds", "screen_seconds", "quick_kl_seconds", "measure_seconds"):
        print(f"median {key}: {sorted(float(row[key]) for row in rows)[len(rows) // 2]:.3f}")


if __name__ == "__main__":
    main()
