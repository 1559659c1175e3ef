"""Features of experts equal their definitions in numpy, and a family of formulas its members."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from prunezero.errors import CriterionError, StatisticsError
from prunezero.formula.criterion import Criterion
from prunezero.formula.domains import DOMAINS
from prunezero.formula.features import FEATURES, features_of_domain
from prunezero.scoring.expert_features import Mixture, expert_feature
from prunezero.scoring.score import score_units
from prunezero.scoring.statistics import ROUTING_SUMS, Statistics, routing_contribution

ROWS = features_of_domain("expert")
EXPERTS, HIDDEN, INNER, TOKENS, SEQUENCES, TOP_K = 4, 5, 3, 12, 3, 2
COST = {"parameters": 50.0}

Array = np.ndarray[Any, Any]


def tables(seed: int = 0) -> list[dict[str, Array]]:
    """What routers and experts did, by letter, for each sequence; expert 3 is never chosen."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(SEQUENCES):
        routed = np.zeros((TOKENS, EXPERTS))
        for row in routed:
            row[generator.choice(EXPERTS - 1, TOP_K, replace=False)] = 1
        outputs = generator.normal(size=(TOKENS, EXPERTS, HIDDEN)) * routed[..., None]
        found.append(
            {
                "r": routed,
                "g": routed * generator.random(routed.shape),
                "s": generator.dirichlet(np.ones(EXPERTS), TOKENS),
                "n": np.linalg.norm(outputs, axis=2),
                "o": outputs,
                "f": outputs.sum(0),
                "t": generator.random(TOKENS),
                "a": generator.random(EXPERTS) * routed.any(0),
                "w": generator.random(EXPERTS),
                "e": generator.normal(size=routed.shape) * routed,
            }
        )
    return found


def mixture(seen: list[dict[str, Array]], names: Any = None) -> Mixture:
    wanted = [*ROUTING_SUMS, "mask_gradients"] if names is None else names
    statistics = Statistics.empty(wanted, HIDDEN, EXPERTS)
    for one in seen:
        told = {letter: torch.from_numpy(value) for letter, value in one.items()}
        statistics.add(routing_contribution(told, wanted, TOKENS, layer="layers.0.mlp"))
    generator = torch.Generator().manual_seed(1)
    weights = {
        "up": torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator),
        "down": torch.randn(EXPERTS, HIDDEN, INNER, generator=generator),
        "router": torch.randn(EXPERTS, HIDDEN, generator=generator),
    }
    return Mixture(weights, statistics, COST, "layers.0.mlp")


def expected(name: str, seen: list[dict[str, Array]], known: Mixture) -> list[float]:
    every = {key: np.concatenate([one[key] for one in seen]) for key in "rgsnote"}
    total = TOKENS * SEQUENCES
    weights = {key: value.numpy().astype(np.float64) for key, value in known.weights.items()}
    flat = [
        np.concatenate([weights["up"][at].ravel(), weights["down"][at].ravel()])
        for at in range(EXPERTS)
    ]
    masks = np.stack([one["e"].sum(0) for one in seen])
    found = []
    for at in range(EXPERTS):
        here = every["r"][:, at] > 0
        g, n, t = every["g"][here, at], every["n"][here, at], every["t"][here]
        outputs = every["o"][here, at]
        others = [int((here & (every["r"][:, o] > 0)).sum()) for o in range(EXPERTS) if o != at]
        values = {
            "N": here.sum() / total,
            "GATE": g.sum() / total,
            "GATE2": (g**2).sum() / total,
            "SOFT": every["s"][:, at].mean(),
            "F1": n.sum() / total,
            "F2": (n**2).sum() / total,
            "GF": (g * n).sum() / total,
            "GF2": ((g * n) ** 2).sum() / total,
            "TGF": (t * g * n).sum() / total,
            "FVAR": outputs.var(0).sum() if len(outputs) else 0.0,
            "AMAX": max(one["a"][at] for one in seen),
            "CO": max(others) / here.sum() if here.any() else 0.0,
            "W1": np.abs(flat[at]).mean(),
            "W2": np.sqrt((flat[at] ** 2).mean()),
            "ROUTER": np.linalg.norm(weights["router"][at]),
            "LOO": sum(one["w"][at] for one in seen),
            "M": masks[:, at].sum(),
            "M1": np.abs(masks[:, at]).sum(),
            "M2": (masks[:, at] ** 2).sum(),
            "PARAMS": COST["parameters"],
        }
        found.append(float(values[name]))
    return found


@pytest.mark.parametrize("name", sorted(set(ROWS) - {"RND"}))
def test_a_feature_of_experts_equals_its_definition(name: str) -> None:
    seen = tables()
    known = mixture(seen)
    value = expert_feature(name, known)
    assert value.dtype == torch.float32 and tuple(value.shape) == (EXPERTS, 1)
    np.testing.assert_allclose(
        value[:, 0].numpy(), expected(name, seen, known), rtol=2e-6, atol=1e-7
    )


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_feature_of_experts_needs_no_more_sums_than_its_row_names(name: str) -> None:
    seen = tables()
    alone, every = mixture(seen, FEATURES[name].sums), mixture(seen)
    assert torch.equal(expert_feature(name, alone), expert_feature(name, every))
    if FEATURES[name].sums:
        with pytest.raises(StatisticsError, match="was not collected|saw no calibration"):
            expert_feature(name, Mixture(every.weights, None, COST, "layers.0.mlp"))


def test_experts_have_noise_that_place_and_seed_decide() -> None:
    known = mixture(tables())
    values = expert_feature("RND", known)
    other = Mixture(known.weights, known.statistics, COST, "layers.1.mlp")
    assert torch.equal(values, expert_feature("RND", known))
    assert not torch.equal(values, expert_feature("RND", other))


# Named points (b, a, c) of S = sum over routed tokens of g^a * |f|^c / n^b, arXiv:2606.15716.
FAMILY = {
    "N": (0, 0, 0),
    "GATE": (0, 1, 0),
    "F1": (0, 0, 1),
    "GF": (0, 1, 1),
    "GF/N": (1, 1, 1),
    "F1/N": (1, 0, 1),
    "F2/N": (1, 0, 2),
    "GF2": (0, 2, 2),
}


@pytest.mark.parametrize(("formula", "point"), FAMILY.items())
def test_formulas_are_the_named_points_of_one_family_of_gated_sums(
    formula: str, point: tuple[int, int, int]
) -> None:
    b, a, c = point
    seen = tables(2)
    known, criterion = mixture(seen), Criterion.parse(formula)
    values = {name: expert_feature(name, known) for name in criterion.features}
    scores = score_units(criterion, known.weights["router"], values)
    wanted = []
    for at in range(EXPERTS):
        total, count = 0.0, 0
        for one in seen:
            for token in range(TOKENS):
                if one["r"][token, at]:
                    count += 1
                    total += one["g"][token, at] ** a * one["n"][token, at] ** c
        wanted.append(total / count**b if count else 0.0)
    # By tokens of the text where it is no mean over those routed.
    scale = 1 if b else TOKENS * SEQUENCES
    np.testing.assert_allclose(scores.numpy() * scale, wanted, rtol=1e-5, atol=1e-7)


def test_formulas_of_experts_look_at_experts_alone() -> None:
    DOMAINS["expert"].refuse(Criterion.parse("zscore(GF/N) + W1"))
    for text in ("N*X", "abs(W)", "BI"):
        with pytest.raises(CriterionError, match="says nothing of expert x number"):
            DOMAINS["expert"].refuse(Criterion.parse(text))
    with pytest.raises(CriterionError, match="says nothing of unit x part"):
        DOMAINS["unit"].refuse(Criterion.parse("GF"))
