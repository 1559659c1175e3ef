"""`--memory-limit` of compare and search: planned and said before the work, kept, and measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunezero.cli.quantities import bytes_of
from prunezero.errors import RecipeError

if TYPE_CHECKING:
    from prunezero.pruning.memory_plan import MemoryPlan
    from prunezero.pruning.testbed import Testbed

MemoryLimit = Annotated[
    str | None,
    typer.Option(
        "--memory-limit",
        "--memory",
        help="Such as 900MiB or 16GiB: sums over calibration text stay on disk, and dense weights "
        "are read from the model's files again; results are the same to the last bit. What the "
        "least is, tells `prunezero plan`.",
    ),
]


class Limit:
    """A limit on memory, of the GPU where the model is on one, or none."""

    def __init__(self, typed: str | None, device: str) -> None:
        """Read the limit, and begin to measure where there is one; no model is loaded yet.

        Args:
            typed: as on the command line; None for no limit.
            device: as on the command line.

        Raises:
            RecipeError: it is no size.
            ModelError: the device cannot be used here.
        """
        self.bytes = bytes_of(typed)
        self._plan: MemoryPlan | None = None
        if self.bytes is not None:
            from prunezero.models.loading.load import device_of
            from prunezero.models.streaming.memory import PeakMemory

            self._peak = PeakMemory(device_of(device))

    def refuse_workers(self, workers: int, cluster: str | None) -> None:
        """Refuse more processes than the one that keeps within the limit.

        Raises:
            RecipeError: there are others.
        """
        if self.bytes is not None and (workers > 1 or cluster is not None):
            raise RecipeError(
                "--memory-limit is kept by one process, and each worker holds a model and samples "
                "of its own; leave --workers and --cluster out, or the limit"
            )

    def kept_on(self, testbed: Testbed, plan_of: Callable[[int], MemoryPlan]) -> Testbed:
        """The testbed that keeps within the limit; what the work takes is said, in one line.

        Args:
            plan_of: the plan within so many bytes.

        Raises:
            RecipeError, SearchError: the work cannot be planned.
            ModelError: it takes more than the limit at least.
        """
        if self.bytes is None:
            return testbed
        from prunezero.cli.tables import say
        from prunezero.files.places import mebibytes

        self._plan = plan = plan_of(self.bytes)
        say(f"this takes about {plan}; the limit is {mebibytes(self.bytes)}")
        return replace(testbed, gradient_bytes=plan.gradient_bytes)

    def measured(self) -> dict[str, Any]:
        """What is written beside results, as `memory`, and said; nothing without a limit."""
        if self.bytes is None or self._plan is None:
            return {}
        from prunezero.cli.tables import say
        from prunezero.files.places import mebibytes

        peak = self._peak.growth
        say(
            f"peak memory: {mebibytes(peak)} (planned {mebibytes(self._plan.total)}); the limit is "
            f"{mebibytes(self.bytes)}{'' if peak <= self.bytes else ', which was not kept'}"
        )
        return {
            "memory": {
                "limit_bytes": self.bytes,
                "planned_bytes": self._plan.total,
                "peak_bytes": peak,
                "gradient_passes": self._plan.passes,
            }
        }
