"""The model card says what was done, and does not promise speed."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from prunezero.formula.criterion import Criterion
from prunezero.report.export.card import is_hub_id, model_card, results_table

RESULT: dict[str, Any] = {
    "model": "org/small",
    "method": "wanda",
    "sparsity": 0.5,
    "pattern": "2:4",
    "sequence_length": 512,
    "seed": 0,
    "test_perplexity": 21.349,
    "kl": 0.1234567,
}


def card(base_model: str = "org/small", **changes: Any) -> tuple[dict[str, Any], str]:
    text = model_card(base_model, Criterion.parse("abs(W)*X"), [RESULT], **changes)
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body.strip()


def test_front_matter_says_what_the_hub_asks() -> None:
    front, _ = card(license_id="apache-2.0")
    assert front == {
        "base_model": "org/small",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "sparse", "prunezero"],
        "license": "apache-2.0",
    }
    assert "license" not in card()[0]


def test_the_first_line_promises_neither_size_nor_speed_of_any_pattern() -> None:
    _, body = card()
    assert body.startswith("Zeros do not make a model smaller or faster by themselves")


def test_the_table_names_the_conditions_of_each_number() -> None:
    assert results_table([RESULT]).splitlines()[2] == (
        "| org/small | wanda | 50% | 2:4 | 512 | 0 | 21.35 | 0.1235 |"
    )
    header = results_table([{"model": "a|b", "method": None}]).splitlines()
    assert header[0] == "| Model |" and header[2] == "| a\\|b |"


def test_the_card_shows_the_formula_and_the_recipe() -> None:
    _, body = card(recipe="name: wanda\n", note="Found last night.")
    assert "`abs(W)*X`" in body and "```yaml\nname: wanda\n```" in body
    assert body.endswith("Found last night.")


def test_the_card_shows_formulas_of_some_layers_behind_that_of_the_others() -> None:
    _, body = card(criteria={"down_proj": Criterion.parse("abs(W)/C1")})
    usual, own = (
        body.index("`abs(W)*X`"),
        body.index("Layers `down_proj` have a formula of their own"),
    )
    assert usual < own < body.index("`abs(W)/C1`") < body.index("## Results")


@pytest.mark.parametrize("name", ["/home/me/model", "demo", "./a/b", "a/b/c", "a b/c", "x.gguf"])
def test_a_folder_is_never_named_as_a_hub_model(name: str) -> None:
    assert not is_hub_id(name)
    assert "base_model" not in card(name)[0]
