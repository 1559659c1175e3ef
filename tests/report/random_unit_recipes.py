"""Recipes that remove units, drawn from what the search spaces for units offer and some more."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

from prunezero.formula.features import FEATURES, features_of_domain
from prunezero.formula.vocabulary import OPERATORS
from prunezero.pruning.kinds import UNITS
from prunezero.searching.spaces.space import SearchSpace

SPACES = ("width", "neurons", "heads")
# Parts of formulas that no space offers, of gradients of single weights among them.
MORE = ("RND", "row_sum(abs(W*S))", "row_norm(W*G)", "row_sum(G1)", "row_norm(F)", "M")
OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "members": ("producers", "all", "all"),
    "combine": ("mean", "max", "product"),
    "channels": ("sum", "mean", "max", "l2"),
    "normalise": ("zscore", "mean", "l2", "max"),
    "measure": ("units", "flops", "weights", "kv bytes"),
    "least": (2, 2, 3, 20),
    "multiple_of": (2, 8, 16),
    "protect_first": (1,),
    "protect_last": (1, 2),
    "seed": (7,),
}
UPDATES: tuple[Any, ...] = ("none", "none", "bias", "refit", ["refit", "bias"])
UPDATES += ({"refit": {"damping": 0.1}},)


def random_unit_formula(rng: random.Random, space: SearchSpace) -> str:
    """A formula of a space's parts by its operators; rarely one of single weights too."""
    # What is measured on trial has no page; one of many asks for it all the same.
    words = [str(word) for word in space.terminals if str(word) != "SLOPE" or rng.random() < 0.1]
    words += MORE if rng.random() < 0.4 else ()
    if rng.random() < 0.1:
        left_out = ("MS", "SLOPE")
        known = [name for name in features_of_domain("unit") if not FEATURES[name].of_training]
        words += [name for name in known if name not in left_out]
    return _formula(rng, space, words, rng.choice([0, 1, 1, 2, 3]))


def _formula(rng: random.Random, space: SearchSpace, words: list[str], depth: int) -> str:
    if depth == 0 or rng.random() < 0.15:
        return rng.choice(words) if rng.random() < 0.93 else str(rng.choice(space.constants))
    operator = OPERATORS[rng.choice(list(space.operators))]
    sides = {"x": _formula(rng, space, words, depth - 1)}
    sides["y"] = _formula(rng, space, words, depth - 1)
    text = re.sub(r"\b[xy]\b", lambda found: f"({sides[found[0]]})", operator.usage)
    return text.replace("** 0.5", f"** ({rng.choice(space.exponents)})")


def random_unit_recipe(rng: random.Random) -> dict[str, Any]:
    """A recipe as its file would hold it; one of twenty is what no page can follow."""
    name = rng.choice(SPACES)
    space = SearchSpace.load(name)
    recipe: dict[str, Any] = {"name": "random", "criterion": random_unit_formula(rng, space)}
    recipe |= {"compare": rng.choice(["group", "model"]), "update": rng.choice(UPDATES)}
    unit = rng.choice(list(space.choices["unit"])) if rng.random() < 0.5 else space.unit
    word, numbers = (unit, {}) if isinstance(unit, str) else next(iter(unit.items()))
    if rng.random() < 0.1:
        word = "head"
    for key in rng.sample(list(OPTIONS), rng.choice([0, 0, 1, 2])):
        numbers = {**numbers, key: rng.choice(OPTIONS[key])}
    known = UNITS[word].options.model_fields
    recipe["unit"] = {word: {key: value for key, value in numbers.items() if key in known}}
    if rng.random() < 0.05:
        recipe[rng.choice(["targets", "ignore"])] = [rng.choice(["re:mlp|fc", "re:attn|attention"])]
    if rng.random() < 0.05:
        recipe |= rng.choice(
            [
                {"statistics": "sequential"},
                {"schedule": "iterative"},
                {"allocate": "slopes", "compare": "group"},
                {"unit": {word: {"rescore": 4}}},
            ]
        )
    return recipe


def random_share(rng: random.Random) -> float:
    """A sparsity, 0 and nearly all among them."""
    usual = [0.5, 0.29, 0.2, 1 / 3, round(rng.random() * 0.6, 3)]
    return rng.choice(usual if rng.random() < 0.85 else [0.75, 0.0, 0.95, 0.999])
