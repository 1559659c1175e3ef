"""A recipe that removes experts as one page of plain Python: `expert_template.py` made particular.

The constants of `expert_words.py` become the words of the recipe, and settle which branches stay;
bodies of `score` and `sums_of` follow from the rows of the features that its formula reads.
"""

from __future__ import annotations

import re
from pathlib import Path

from prunezero.formula.code import torch_lines
from prunezero.formula.features import FEATURES
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.unit_options import Experts
from prunezero.report.export.page_folding import constants_of, folded, needed
from prunezero.report.export.page_text import PARTS, check_page, exchange
from prunezero.report.export.page_words import page_docstring
from prunezero.report.quoting import python_string, python_strings
from prunezero.scoring.statistics import ROUTING_SUMS

# How a page makes what the text of a feature reads, beside sums and counts.
_MADE = {
    "up": "mixture.experts.gate_up_proj.detach()",
    "down": "mixture.experts.down_proj.detach()",
    "router": "mixture.router.weight.detach()",
    "noise": "drawn(mixture)",
    "parameters": 'torch.full((mixture.units,), mixture.cost["parameters"], dtype=torch.float64)',
}
_COUNTS = ("tokens", "sequences")
_GRADIENTS = "mask_gradients"


def unfit_experts(recipe: Recipe) -> list[str]:
    """What a recipe says of its experts that no page can follow, as it spells it."""
    options = recipe.unit.options
    assert isinstance(options, Experts)  # the unit is expert; for the type checker
    usual = {"instead": "others", "skip": "none"}
    left = {key: getattr(options, key) for key in usual if getattr(options, key) != usual[key]}
    told = ", ".join(f"{key} {value}" for key, value in left.items())
    return [f"unit: {recipe.unit.word} ({told})"] if left else []


def expert_page(recipe: Recipe) -> str:
    """The text of the page of a recipe that one can follow: it imports nothing of prunezero."""
    options = recipe.unit.options
    assert isinstance(options, Experts)  # the unit is expert; for the type checker
    sums = sorted({name for one in recipe.criterion.features for name in FEATURES[one].sums})
    sums = sorted({*sums, *options.sums})
    letters = {letter for name in sums for letter in _letters(name)}
    new = {
        "score": _score_body(recipe),
        "sums_of": _sums_body(sums),
        "COMPARE": python_string(recipe.compare),
        "MEASURE": python_string(recipe.unit.measure),
        "GUARD": python_string(options.guard),
        "PROTECT_FIRST": repr(options.protect_first),
        "PROTECT_LAST": repr(options.protect_last),
        "SEED": repr(options.seed),
        "LETTERS": python_strings(tuple(sorted(letters))),
    }
    chosen = exchange(_text("expert_words"), new, "")
    known = constants_of(chosen)
    program = folded(exchange(_text("expert_template"), new, _docstring(recipe)), known)
    others = [path.read_text(encoding="utf-8") for path in PARTS]
    page = needed(program, [chosen, folded(_text("expert_choice"), known), *others])
    check_page(page)
    return page


def _text(name: str) -> str:
    return Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")


def _letters(name: str) -> tuple[str, ...]:
    return ("e",) if name == _GRADIENTS else tuple(ROUTING_SUMS[name].letters)


def _sums_body(sums: list[str]) -> list[str]:
    """The body of `sums_of`: what one sequence adds to each sum."""
    letters = sorted({letter for name in sums for letter in _letters(name)})
    lines = [f'{letter} = tables["{letter}"]' for letter in letters]
    texts = {name: "e.sum(0)" if name == _GRADIENTS else ROUTING_SUMS[name].torch for name in sums}
    if not texts:
        return ["return {}"]
    return [*lines, "return {", *(f'    "{name}": {text},' for name, text in texts.items()), "}"]


def _score_body(recipe: Recipe) -> list[str]:
    """The body of `score`: what the formula looks at, and then the formula."""
    features = recipe.criterion.features
    read = {name for one in features for name in FEATURES[one].inputs}
    lines = [
        f"{name} = {_made(name)}" for name in sorted(read) if name not in ("tokens", "sequences")
    ]
    for name in features:
        line = FEATURES[name].line
        for count in ("tokens", "sequences"):
            line = re.sub(rf"\b{count}\b", f'seen["{count}"]', line)
        lines.append(f"{name} = {line}")
    found = "score.expand(mixture.units, 1)[:, 0]"
    return [*lines, *torch_lines(recipe.criterion), f"return {found}"]


def _made(name: str) -> str:
    if name in _MADE:
        return _MADE[name]
    # Mask gradients of units have a channel behind the unit.
    return f'seen["{name}"]' + ("[..., None]" if name == _GRADIENTS else "")


def _docstring(recipe: Recipe) -> str:
    """What the page removes by which formula, in words, and how it is run."""
    several = "experts of each mixture compete" if recipe.compare == "group" else "all compete"
    command = "    python PAGE.py MODEL_FOLDER TEXT_FILE --sparsity 0.25 --output PRUNED_FOLDER"
    meanings = [f"{name}: {FEATURES[name].meaning}" for name in recipe.criterion.features]
    return page_docstring(
        recipe,
        "remove experts of a language model",
        f"{'; '.join(meanings)}.",
        f"Those of the lowest score leave their stacks and their router; {several}. Usage:",
        f"{command}\n    prune_(model, batches, sparsity=0.25)",
    )
