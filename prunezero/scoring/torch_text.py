"""Torch text becomes a function: of features and of formulas, as exported pages hold it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prunezero.formula.features import FEATURES


def function_of(inputs: Sequence[str], lines: Sequence[str]) -> Callable[..., Any]:
    """A function of named values that runs some lines, the last of which returns.

    Args:
        lines: of the vocabulary's rows and of validated expressions alone.
    """
    body = "".join(f"    {line}\n" for line in lines)
    source = f"def formula({', '.join(inputs)}):\n{body}"
    namespace: dict[str, object] = {"torch": torch}
    exec(compile(source, "<torch text>", "exec"), namespace)
    return namespace["formula"]  # type: ignore[return-value]


@functools.cache
def feature_function(name: str) -> Callable[..., Tensor]:
    """The value of a feature, float32, from what its row reads (`Feature.inputs`), by name."""
    row = FEATURES[name]
    return function_of(row.inputs, [f"return {row.line}"])
