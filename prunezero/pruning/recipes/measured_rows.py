"""What may a recipe say of what was measured? Rows of results, as tables and pages read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError


class _Place(BaseModel):
    """A budget, model or draw that a row is a mean over."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=True)
    sparsity: int | float
    pattern: str
    model: str = ""
    seed: int = 0
    search_perplexity: int | float | None = None
    validation_perplexity: int | float | None = None
    test_perplexity: int | float | None = None


class _Row(_Place):
    """One row of results."""

    recipe: str
    seed: int
    draws: int = 1
    sequence_length: int
    calibration_tokens: int
    sparsity_reached: int | float | None = None
    kl: int | float | None = None
    top1_agreement: int | float | None = None
    top5_agreement: int | float | None = None
    acceptance: int | float | None = None
    budgets: list[_Place] | None = None


_ROWS = TypeAdapter(list[_Row])


def check_provenance(provenance: Mapping[str, Any]) -> None:
    """Refuse rows of results, under the key `measured`, that are none.

    Raises:
        ValueError: says which row lacks which key, or what it holds instead.
    """
    try:
        _ROWS.validate_python(provenance.get("measured", []))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in ("measured", *fault["loc"]))
        raise ValueError(
            f"{where} is not as a search writes it ({fault['msg'].lower()}); leave out 'measured', "
            "or take the recipe anew from the folder of its search"
        ) from error


def is_result(row: Mapping[str, Any]) -> bool:
    """Whether a row of a journal can be shown beside others."""
    try:
        _ROWS.validate_python([{"recipe": "it", **row}])
    except ValidationError:
        return False
    return True
