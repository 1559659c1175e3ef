"""Tables: what many formulas of units have in common, computed once.

A search asks for thousands of formulas of the same units. A feature of units is a short vector, and
so is what a formula makes of a whole matrix by a reduction, such as `row_norm(W)`; both are kept. A
formula then combines vectors of as many numbers as there are units, and its value is that of
`score_units` to the last bit, since its steps are the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import lru_cache

from torch import Tensor

from prunezero.formula.code import Step, steps, written_out
from prunezero.formula.criterion import Criterion
from prunezero.formula.features import FEATURES
from prunezero.formula.vocabulary import Operator
from prunezero.scoring.torch_text import function_of

# Vectors that are kept; of a unit each a few thousand numbers at most.
_KEPT = 2**15


class Tables:
    """Vectors of features and of reductions, by the place that they are of."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Tensor] = OrderedDict()

    def value(
        self, criterion: Criterion, place: Hashable, feature_of: Callable[[str], Tensor]
    ) -> Tensor:
        """The value of a criterion on the table of one place, float32 [units, 1 or rest].

        Args:
            place: equal for equal tables of features.
            feature_of: a feature by its name, float32 and broadcastable to the table.
        """
        program, texts = _program(criterion)
        values: dict[str, Tensor | float] = {}

        def of(name: str) -> Tensor | float:
            if name not in values:
                if name in program:
                    values[name] = self._step(program[name], program, (place, texts[name]), of)
                elif name in FEATURES:
                    values[name] = self._feature(name, place, feature_of)
                else:
                    values[name] = float(name)
            return values[name]

        found = of(next(reversed(program)) if program else criterion.text)
        assert isinstance(found, Tensor)  # a criterion holds a feature; for the type checker
        return found

    def _feature(self, name: str, place: Hashable, feature_of: Callable[[str], Tensor]) -> Tensor:
        if FEATURES[name].shape == "element":
            return feature_of(name)
        return self._kept((place, name), lambda: feature_of(name))

    def _step(
        self,
        step: Step,
        program: dict[str, Step],
        key: Hashable,
        of: Callable[[str], Tensor | float],
    ) -> Tensor:
        def computed() -> Tensor:
            return _function(step.operator)(*map(of, step.arguments))

        shapes = [_shape(name, program) for name in step.arguments]
        is_reduced = step.shape in ("row", "scalar") and "element" in shapes
        return self._kept(key, computed) if is_reduced else computed()

    def _kept(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        if key not in self._known:
            self._known[key] = compute()
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]


def _shape(name: str, program: dict[str, Step]) -> str:
    """Of a step, a feature or a number."""
    if name in program:
        return program[name].shape
    return FEATURES[name].shape if name in FEATURES else "scalar"


@lru_cache(maxsize=4096)
def _program(criterion: Criterion) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps of a criterion by name, in their order, and each in words."""
    taken = steps(criterion)
    return {step.name: step for step in taken}, written_out(taken)


@lru_cache(maxsize=256)
def _function(operator: Operator) -> Callable[..., Tensor]:
    """What an operator computes."""
    names = [f"argument_{place}" for place in range(operator.arity)]
    return function_of(names, [f"return {(operator.torch or '').format(*names)}"])
