"""Recipes of all shapes, sound and unsound, drawn from the words that the engine knows."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prunezero.formula.features import features_of_domain
from prunezero.formula.vocabulary import FEATURES, OPERATORS
from prunezero.pruning.recipes.words import WORDS
from prunezero.scoring.request import GROUPS

EXPONENTS = ("0.5", "2", "3", "0.25", "-1", "-0.5", "0.3", "1.7")
NUMBERS = ("0.5", "2", "0.1", "3", "100", "0.001", "-1.5")
# Numbers that these words of a recipe do not have by themselves.
NEEDED = {"table": {"ratios": {"q_proj": 0.5}}}


@dataclass(frozen=True)
class Request:
    """A recipe as its file would hold it, and what it is asked for."""

    recipe: dict[str, Any]
    sparsity: float | None
    # told when the page is run, in place of the recipe's own; None leaves that
    pattern: str | None


def random_formula(rng: random.Random) -> str:
    """A formula that varies by element, by row, by column, or not at all."""
    shape = rng.choice([*["element"] * 6, "row", "column", "column", "scalar"])
    known = [FEATURES[name] for name in features_of_domain("matrix")]
    names = [row.name for row in known if shape in ("element", "scalar", row.shape)]
    text = _formula(rng, names, rng.choice([0, 1, 2, 2, 3]))
    if shape == "element" and rng.random() < 0.7:
        text = f"abs(W)*({text})"
    if shape == "scalar":
        text = f"layer_{rng.choice(['sum', 'mean', 'max', 'norm'])}({text})"
    return text


def _formula(rng: random.Random, names: Sequence[str], depth: int) -> str:
    if depth == 0 or rng.random() < 0.15:
        return rng.choice(names) if rng.random() < 0.9 else rng.choice(NUMBERS)
    operator = rng.choice(list(OPERATORS.values()))
    sides = {"x": _formula(rng, names, depth - 1), "y": _formula(rng, names, depth - 1)}
    text = re.sub(r"\b[xy]\b", lambda found: f"({sides[found[0]]})", operator.usage)
    return text.replace("** 0.5", f"** ({rng.choice(EXPONENTS)})")


def random_pattern(rng: random.Random) -> str:
    """Free, an N:M of many sizes, or rarely what is neither."""
    if rng.random() < 0.5:
        return "free"
    if rng.random() < 0.03:
        return rng.choice(["4:2", "0:4", "4:4", "two:four", "", "2:4:8", "02:04", "2:4\n", "-1:4"])
    of = rng.choice([2, 4, 8] if rng.random() < 0.8 else [16, 32, 3, 5, 11, 20, 24, 33, 64])
    return f"{rng.randint(1, of - 1)}:{of}"


def random_group(rng: random.Random) -> str:
    word = rng.choice([*GROUPS, "row", "model"])
    if rng.random() < 0.02:
        return rng.choice(["rows", "0 columns", "N columns", "-3 columns", "8 rows"])
    return word.replace("N ", f"{rng.choice([1, 2, 3, 5, 7, 8, 16, 24, 100])} ")


def random_sparsity(rng: random.Random, pattern: str) -> float | None:
    """What the pattern says, any fraction with 0 and nearly 1 among them, rarely none at all."""
    found = re.fullmatch(r"(\d+):([1-9]\d*)", pattern)
    if found and rng.random() < 0.9:
        return rng.choice([None, 1 - int(found[1]) / int(found[2])])
    odd = [0.0, 1e-9, 0.001, 0.999, 0.9999999, 1.0, -0.1, math.nan, None]
    usual = [0.5, 0.29, 0.7, 1 / 3, round(rng.random(), 3)]
    return rng.choice(odd if rng.random() < 0.12 else usual)


def random_patterns(rng: random.Random, names: Sequence[str]) -> list[str]:
    """Patterns of layers: names, last parts, expressions, and rarely what means no layer."""
    rarely = ["nothing", "proj", "", "re:(", "re:^$", "Q_PROJ"]
    often = ["re:(?i)Q_PROJ", r"re:\.0\..*", "re:(.)\\1", r"re:(?P<n>up|down)", "re:[kq]_"]
    found = []
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice(names)
        ending = name.rsplit(".", rng.choice([1, 2]))[-1]
        found.append(rng.choice([name, ending, ending, rng.choice(often)]))
        if rng.random() < 0.03:
            found[-1] = rng.choice(rarely)
    return found


def random_recipe(rng: random.Random, names: Sequence[str]) -> dict[str, Any]:
    """A recipe for a model with layers of these names; a tenth makes choices around the mask."""
    recipe: dict[str, Any] = {"name": "random", "criterion": random_formula(rng)}
    recipe |= {"compare": random_group(rng), "pattern": random_pattern(rng)}
    for key in ("targets", "ignore"):
        if rng.random() < 0.15:
            recipe[key] = random_patterns(rng, names)
    if rng.random() < 0.2:
        patterns = random_patterns(rng, names)
        recipe["criteria"] = {pattern: random_formula(rng) for pattern in patterns}
    if rng.random() < 0.1:
        recipe["damping"] = rng.choice([1e-6, 0.1, 1.0])
    if rng.random() < 0.1:
        arrow = rng.choice([*WORDS, "statistics"])
        word = rng.choice(list(WORDS.get(arrow, ["sequential"])))
        recipe[arrow] = {word: NEEDED[word]} if word in NEEDED else word
    return recipe


def random_request(rng: random.Random, recipe: dict[str, Any]) -> Request:
    """What a recipe is asked for: a sparsity, and now and then another pattern."""
    pattern = random_pattern(rng) if rng.random() < 0.4 else None
    sparsity = random_sparsity(rng, pattern or recipe["pattern"])
    return Request(recipe, sparsity, pattern)
