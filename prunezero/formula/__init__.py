"""Criteria: formulas over weights, activations and gradients, as SymPy expressions."""

from prunezero.formula.criterion import Criterion
from prunezero.formula.vocabulary import FEATURES, OPERATORS, SIGNALS

__all__ = ["FEATURES", "OPERATORS", "SIGNALS", "Criterion"]
