"""Verification of a search: its best recipes measured anew, without its journal."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunezero.errors import SearchError, differences, shell_word
from prunezero.models.observing.calibration import Progress
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.testbed import Testbed, set_up
from prunezero.report.runs.summary import Run, best_row, front, rule_of
from prunezero.searching.evaluation.journal import refuse_other_format
from prunezero.searching.experiment.provenance import FORMAT, further_draws, further_models, subject
from prunezero.searching.experiment.testbeds import beside
from prunezero.searching.session import open_session

SPLITS = ("search", "validation", "test")
# Numbers that differ by no more than this fraction are the same.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Claim:
    """A recipe and what a search reports of it, by its objective."""

    name: str
    """of the recipe, for a table"""
    recipe: Recipe
    """what was measured"""
    reported: Mapping[str, float | None]
    """number by split; None where it was not finite; splits that it was not measured on lack"""


@dataclass(frozen=True)
class Check:
    """One number, measured anew."""

    name: str
    """of the recipe"""
    split: str
    """of the text"""
    recomputed: float | None
    """None where it is not finite"""
    reported: float | None = None
    """the same"""
    is_reported: bool = False
    """whether the search reports anything"""

    @property
    def difference(self) -> float | None:
        """Relative to what was reported; None where there are no two numbers."""
        if self.reported is None or self.recomputed is None:
            return None
        return self.recomputed / self.reported - 1 if self.reported else math.inf

    @property
    def agrees(self) -> bool:
        """Whether it is what was reported, or nothing was."""
        if not self.is_reported:
            return True
        if self.difference is None:
            return self.reported is self.recomputed
        return abs(self.difference) <= TOLERANCE


def testbeds_of(run: Run) -> tuple[Testbed, ...]:
    """The models and the text of a search, exactly as it was searched on them; its own first.

    Raises:
        SearchError: nothing tells which, or they are others now; what differs is told.
        PruneZeroError: they cannot be loaded.
    """
    config = run.config
    if not run.has_names:
        raise SearchError(
            f"{run.folder} holds no search.json, so its model and text are not known; "
            "go on with it by `prunezero search --resume` and all its options, which writes one"
        )
    refuse_other_format(run.header, FORMAT, run.folder)
    sizes, device = config.settings, config.device
    testbed = set_up(config.model, config.text, sizes, dtype=config.dtype, device=device)
    others = beside(testbed, config.also_model, device=device)
    now: dict[str, Any] = {
        **subject(testbed),
        **further_models(others),
        **further_draws((testbed, *others), config.draws),
    }
    keys = (*now, "also_models", "also_dtypes", "also_token_ids", "drawn_token_ids")
    changed = differences({key: run.header.get(key) for key in keys}, now)
    if changed:
        models = ", ".join([config.model, *config.also_model])
        raise SearchError(
            f"{models} and {config.text} text are not what {run.folder} was searched on "
            f"({changed}); put back those files to verify it"
        )
    return testbed, *others


def claims(run: Run, top: int) -> list[Claim]:
    """What a search reports: of its winner, and of the best of its front.

    Raises:
        SearchError: it has measured nothing yet.
        PruneZeroError: a recipe or formula cannot be read.
    """
    found = []
    keys = {split: run.task.objective.key(split) for split in SPLITS}
    if run.recipe is not None and run.measured:
        reported = {**(best_row(run) or {}), **run.measured[-1]}
        # A number that was not finite is left out of the recipe's rows.
        shown = {split: reported.get(key) for split, key in keys.items()}
        found.append(Claim(f"winner {run.recipe.name}", run.recipe, shown))
    for row in reversed(front(run.candidates or (), top)):
        name = f"candidate-{row['slot']}"
        values = {split: row.get(key) for split, key in keys.items()}
        measured = {split: value for split, value in values.items() if value is not None}
        found.append(Claim(name, run.task.recipe(rule_of(row), name), measured))
    if not found:
        raise SearchError(
            f"{run.folder} has no measured candidates to verify yet; go on with it by "
            f"`prunezero search --name {shell_word(run.folder.name)} --resume`"
        )
    return found


def verify(
    run: Run, testbeds: Sequence[Testbed], claimed: list[Claim], progress: Progress | None = None
) -> Iterator[Check]:
    """Measure every claim anew on all three texts; yields each number as it is known.

    Args:
        testbeds: of the search, its own model first.

    Raises:
        PruneZeroError: model, text and recipes do not go together.
    """
    with tempfile.TemporaryDirectory(prefix="prunezero-verify-") as folder:
        session = open_session(testbeds, run.task, Path(folder) / "anew", progress=progress)
        try:
            for claim in claimed:
                # What fails on some layer has no number, and says so by a fault.
                row: dict[str, Any] = next(session.rungs.rows([claim.recipe], SPLITS))
                for split in SPLITS:
                    yield Check(
                        claim.name,
                        split,
                        row.get(run.task.objective.key(split)),
                        claim.reported.get(split),
                        split in claim.reported,
                    )
        finally:
            session.rungs.close()


def verdict(run: Run, checks: list[Check]) -> str:
    """One sentence on what differs; empty where everything holds."""
    wrong = [check for check in checks if not check.agrees]
    if not wrong:
        return ""
    told = [
        f"{check.name} on {check.split} text {_shown(check.reported)} reported, "
        f"{_shown(check.recomputed)} recomputed"
        for check in wrong[:3]
    ]
    more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    count = sum(check.is_reported for check in checks)
    return (
        f"{run.folder} does not hold: {len(wrong)} of {count} {measured_things(run)} differ by "
        f"more than {TOLERANCE:.2%}: {'; '.join(told)}{more}"
    )


def measured_things(run: Run) -> str:
    """What was measured of it, in the plural."""
    objective = run.task.objective
    return "perplexities" if objective.is_usual else f"numbers of {objective.text}"


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"
