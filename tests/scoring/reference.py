"""The published formulas and the selection rule once more, in plain numpy and plain loops.

Written from the equations, with nothing imported from prunezero: what the package computes is
compared with this file. All arithmetic is float32; sums are taken in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Values = dict[str, Array]


def safe_divide(numerator: Array, denominator: Array) -> Array:
    """Elementwise quotient in float32 where x/0 is 0."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    quotient = np.zeros(numerator.shape, dtype=np.float32)
    np.divide(numerator, denominator, out=quotient, where=denominator != 0)
    return quotient


def column_sums(magnitudes: Array) -> Array:
    return magnitudes.astype(np.float64).sum(axis=0, keepdims=True).astype(np.float32)


def row_sums(magnitudes: Array) -> Array:
    return magnitudes.astype(np.float64).sum(axis=1, keepdims=True).astype(np.float32)


def magnitude(values: Values) -> Array:
    return np.abs(values["W"])


def relative_importance(values: Values) -> Array:
    """RI: A/c + A/r (Zhang et al. 2024)."""
    magnitudes = np.abs(values["W"])
    by_column = safe_divide(magnitudes, column_sums(magnitudes))
    by_row = safe_divide(magnitudes, row_sums(magnitudes))
    return by_column + by_row


def relative_importance_and_activation(values: Values) -> Array:
    """RIA: (A/c + A/r) * sqrt(x) (Zhang et al. 2024)."""
    return relative_importance(values) * np.sqrt(values["X"])


def wanda(values: Values) -> Array:
    """A * x (Sun et al. 2024)."""
    return np.abs(values["W"]) * values["X"]


def gblm(values: Values) -> Array:
    """A * (x + 100 * sum|g|) (Das et al. 2023)."""
    return np.abs(values["W"]) * (values["X"] + np.float32(100) * values["G1"])


def pruner_zero(values: Values) -> Array:
    """A^2 * minmax(G) over the whole matrix (Dong et al. 2024)."""
    gradients = values["G"]
    lowest, highest = gradients.min(), gradients.max()
    scaled = safe_divide(gradients - lowest, np.full_like(gradients, highest - lowest))
    return (values["W"] * values["W"]) * scaled


def optimal_brain_damage(values: Values) -> Array:
    """w^2 * h with the layer-wise curvature h = x^2 (LeCun et al. 1989)."""
    return (values["W"] * values["W"]) * (values["X"] * values["X"])


def fisher(values: Values) -> Array:
    """w^2 * G^2, the empirical Fisher information in place of the curvature."""
    return (values["W"] * values["W"]) * (values["G"] * values["G"])


def sparse_gpt(values: Values) -> Array:
    """w^2 / u^2, u the diagonal of the factor of the inverse (Frantar & Alistarh 2023)."""
    return safe_divide(values["W"] * values["W"], values["U"] * values["U"])


def improved_saliency(values: Values) -> Array:
    """w^2 * (h + 1/v), brain damage and surgeon at once (Shao et al. 2024)."""
    ones = np.ones_like(values["V"])
    return (values["W"] * values["W"]) * (values["H"] + safe_divide(ones, values["V"]))


FORMULAS: dict[str, Callable[[Values], Array]] = {
    "magnitude": magnitude,
    "magnitude_row": magnitude,
    "ri": relative_importance,
    "ria": relative_importance_and_activation,
    "wanda": wanda,
    "gblm": gblm,
    "pruner_zero": pruner_zero,
    "obd": optimal_brain_damage,
    "fisher": fisher,
    "sparsegpt": sparse_gpt,
    "isc": improved_saliency,
    "prune_and_tune": sparse_gpt,
    "ria_permuted": relative_importance_and_activation,
    # These differ from Wanda in what stands around the formula.
    "admm": wanda,
    "alphapruning": wanda,
    "dsnot": wanda,
    "owl": wanda,
    "swaps": wanda,
}


def lowest(scores: Array, sparsity: str) -> Array:
    """True for the first floor(n * sparsity) of a stable ascending sort of a flat array."""
    removed = np.zeros(scores.size, dtype=bool)
    count = scores.size * Fraction(sparsity) // 1
    # Adding zero turns -0.0 into 0.0, and a stable sort then keeps their order.
    order = np.argsort(scores.reshape(-1) + np.float32(0), kind="stable")
    removed[order[: int(count)]] = True
    return removed


def keep_rows(scores: Array, sparsity: str) -> Array:
    return np.stack([~lowest(row, sparsity) for row in scores])


def keep_layer(scores: Array, sparsity: str) -> Array:
    flat = np.ascontiguousarray(scores)
    return ~lowest(flat, sparsity).reshape(scores.shape)


def keep_blocks(scores: Array, sparsity: str, columns: int) -> Array:
    starts = range(0, scores.shape[1], columns)
    blocks = [keep_layer(scores[:, start : start + columns], sparsity) for start in starts]
    return np.concatenate(blocks, axis=1)


def keep_pattern(scores: Array, keep: int, of: int) -> Array:
    """N:M by hand: in every group of `of` columns, strike out the lowest one at a time."""
    mask = np.ones(scores.shape, dtype=bool)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], of):
            left = list(range(start, start + of))
            for _ in range(of - keep):
                victim = min(left, key=lambda column: (float(scores[row, column]), column))
                left.remove(victim)
                mask[row, victim] = False
    return mask


def keep_model(matrices: list[Array], sparsity: str) -> list[Array]:
    flat = np.concatenate([np.ascontiguousarray(matrix).reshape(-1) for matrix in matrices])
    kept = ~lowest(flat, sparsity)
    edges = np.cumsum([matrix.size for matrix in matrices])[:-1]
    parts = np.split(kept, edges)
    return [part.reshape(matrix.shape) for part, matrix in zip(parts, matrices, strict=True)]
