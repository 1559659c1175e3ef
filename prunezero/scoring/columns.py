"""What are some columns of a layer worth, while the layer is being mended?

A sweep over the columns asks for the scores of a few of them on the weights of that moment. What
does not depend on the weights is derived once, and a formula that stays within its column is
evaluated on the columns asked for alone.
"""

from __future__ import annotations

from torch import Tensor

from prunezero.formula.criterion import Criterion
from prunezero.formula.features import FEATURES
from prunezero.formula.functions import MINMAX, REDUCTIONS, ZSCORE, MatrixFunction
from prunezero.scoring.feature_values import feature
from prunezero.scoring.score import evaluate
from prunezero.scoring.second_order import DAMPING
from prunezero.scoring.statistics import Statistics

# Features that change when the weights do, and those of them that span all columns.
_OF_WEIGHTS = [name for name, row in FEATURES.items() if "weight" in row.inputs]
_OF_ROWS = [name for name in _OF_WEIGHTS if FEATURES[name].shape == "row"]
_WITHIN_COLUMNS = tuple(REDUCTIONS[f"col_{kind}"] for kind in ("sum", "mean", "max", "norm"))


def sees_inputs_alone(criterion: Criterion) -> bool:
    """Whether a score depends on its weight and its input channel and on nothing else."""
    is_local = all(
        name == "W" or FEATURES[name].shape == "column" and name not in _OF_WEIGHTS
        for name in criterion.features
    )
    return is_local and not criterion.sympy.has(MatrixFunction)


class ColumnScores:
    """The scores of some columns of one layer on changing weights.

    Sums and norms over rows, and reductions over the whole matrix, see all columns: those to the
    left as mended and zeroed, those to the right as far as they are mended.
    """

    def __init__(
        self,
        criterion: Criterion,
        weight: Tensor,
        statistics: Statistics | None,
        *,
        damping: float = DAMPING,
    ) -> None:
        """Derive what does not depend on the weights; `damping` as in `score`.

        Raises:
            StatisticsError: a sum that a feature needs was not collected.
        """
        self._criterion = criterion
        self._fixed = {
            name: feature(name, weight, statistics, damping=damping)
            for name in criterion.features
            if name not in _OF_WEIGHTS
        }
        self._changing = [name for name in criterion.features if name in _OF_WEIGHTS]
        wide = [*REDUCTIONS.values(), MINMAX, ZSCORE]
        wide = [function for function in wide if function not in _WITHIN_COLUMNS]
        self._spans_columns = criterion.sympy.has(*wide)

    def __call__(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """Scores `[out, stop - start]` float32 of the columns from `start` to before `stop`.

        Args:
            weight: `[out, in]` float32, as it is now.
        """
        if self._spans_columns:
            values = self._fixed | {name: feature(name, weight) for name in self._changing}
            return evaluate(self._criterion, values, weight.shape)[:, start:stop]
        part = weight[:, start:stop]
        values = {
            name: value if value.shape[1] == 1 else value[:, start:stop]
            for name, value in self._fixed.items()
        }
        for name in self._changing:
            values[name] = feature(name, weight if name in _OF_ROWS else part)
        return evaluate(self._criterion, values, part.shape)
