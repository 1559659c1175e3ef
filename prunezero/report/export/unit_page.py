"""A recipe that removes units as one page of plain Python: `unit_template.py` made particular.

The template and what stands in `unit_choice.py` have a branch for each word of a recipe
(`unit_words.py`); a page keeps those that its own words take, and the functions of `unit_parts.py`
and `page_parts.py` that are left to be called.
"""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import fill

from prunezero.formula.code import torch_lines
from prunezero.formula.features import FEATURES
from prunezero.pruning.recipes.choices import Choice
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.unit_options import Units
from prunezero.report.export.page_folding import constants_of, folded, needed
from prunezero.report.export.page_hooks import listen_body, listen_to_reader, read_body
from prunezero.report.export.page_text import check_page, exchange
from prunezero.report.export.page_words import page_docstring
from prunezero.report.quoting import python_string, python_strings
from prunezero.scoring.statistics import SUMS

# Kinds of units and updates that a page can follow.
_UNITS = ("neuron", "kv_group", "width", "head")
_UPDATES = ("none", "refit", "bias")
# How a page makes what the text of a feature reads, beside sums, from the place of the reader.
_MADE = {
    "gram": 'diagonal_blocks(seen["gram"], shape).double()',
    "inverse": 'inverse_blocks(seen, "inverse", seen["gram"], shape)',
    "centred_inverse": 'inverse_blocks(seen, "centred inverse", centred(seen), shape)',
    "reader": "matrix(last.module).double().T.reshape(*shape, -1)",
    "noise": "drawn(group, SEED)",
    **{
        name: f'torch.full((group.units,), group.cost.get("{measure}", 0.0), dtype=torch.float64)'
        for name, measure in {
            "parameters": "parameters",
            "flops": "flops",
            "kv_bytes": "kv bytes",
        }.items()
    },
}
_COUNTS = ("tokens", "sequences")
_WHAT = {
    "neuron": "remove neurons from the MLPs of a language model",
    "kv_group": "remove key-value heads of a language model, with the query heads that read them,",
    "width": "remove neurons and key-value heads of a language model",
    "head": "remove query heads of a language model, as many of each key-value head,",
}


def unfit_units(recipe: Recipe) -> list[str]:
    """What a recipe says of its units that no page can follow, as it spells it."""
    unit = recipe.unit
    if unit.word not in _UNITS or not isinstance(unit.options, Units):
        return [f"unit: {unit.text}"]
    numbers = unit.options.model_dump(exclude_defaults=True)
    left = {key: value for key, value in numbers.items() if key in ("rescore", "swaps") and value}
    if unit.options.normalise == "slope":
        left["normalise"] = "slope"
    if unit.measure == "milliseconds":
        left["measure"] = unit.measure
    found = (
        [f"unit: {unit.word} ({', '.join(f'{k} {v}' for k, v in left.items())})"] if left else []
    )
    features = [name for name in recipe.criterion.features if not _can_make(name)]
    why = {True: "known while layers train", False: "measured on trial"}
    return found + [f"criterion: {name} ({why[FEATURES[name].of_training]})" for name in features]


def _can_make(feature: str) -> bool:
    """Whether sums, weights and counts of a model are all that a feature follows from."""
    return {*FEATURES[feature].inputs} <= {*SUMS, *_MADE, *_COUNTS, "weight"}


def extras_of_units(recipe: Recipe) -> list[Choice]:
    """The choices around the formula of a recipe for units that no page can follow."""
    return [
        one
        for one in recipe.extras
        if one.arrow != "update" or one.word not in _UPDATES or recipe.unit.word not in _UNITS
    ]


def unit_page(recipe: Recipe) -> str:
    """The text of the page of a recipe that one can follow: it imports nothing of prunezero."""
    options = recipe.unit.options
    assert isinstance(options, Units)  # unfit_units refused others; for the type checker
    seen, learned = _sums(recipe)
    refit = [one.options for one in recipe.update if one.word == "refit"]
    words = {
        "UNIT": recipe.unit.word,
        "COMPARE": recipe.compare,
        "MEASURE": recipe.unit.measure,
        "MEMBERS": options.members,
        "COMBINE": options.combine,
        "CHANNELS": options.channels,
        "NORMALISE": options.normalise,
    }
    lists = {
        "UPDATE": recipe.updates,
        "TARGETS": recipe.targets,
        "IGNORE": recipe.ignore,
        "SEEN": seen,
        "LEARNED": learned,
    }
    numbers = {
        "REFIT_DAMPING": getattr(refit[0], "damping", 0.01) if refit else 0.01,
        "LEAST": options.least,
        "MULTIPLE_OF": options.multiple_of,
        "PROTECT_FIRST": options.protect_first,
        "PROTECT_LAST": options.protect_last,
        "SEED": options.seed,
        "DAMPING": recipe.damping,
        "LOOKS_AT_UNITS": bool(_of_units(recipe)),
    }
    new = {name: python_string(word) for name, word in words.items()}
    new |= {name: python_strings(tuple(found)) for name, found in lists.items()}
    bodies = {
        "score": _score_body(recipe),
        "listen": listen_to_reader(frozenset(seen)),
        "listen_to_weight": listen_body(frozenset(learned)),
        "read": read_body(frozenset({*seen, *learned})),
    }
    new |= {name: repr(number) for name, number in numbers.items()}
    chosen = exchange(_text("unit_words"), new, "")
    known = constants_of(chosen)
    program = folded(exchange(_text("unit_template"), bodies, _docstring(recipe)), known)
    parts = [folded(_text(name), known) for name in ("unit_choice", "unit_parts")]
    page = needed(program, [chosen, *parts, _text("page_parts"), _text("expert_parts")])
    check_page(page)
    return page


def _text(name: str) -> str:
    return Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")


def _of_units(recipe: Recipe) -> list[str]:
    """Features of its formula that have one value for each unit."""
    return [name for name in recipe.criterion.features if FEATURES[name].shape != "element"]


def _sums(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Names of the sums of what readers of units see, and of gradients of single weights."""
    of_units = _of_units(recipe)
    seen = {name for feature in of_units for name in FEATURES[feature].sums}
    seen |= {"gram"} if "refit" in recipe.updates else set()
    seen |= {"input_sum"} if "bias" in recipe.updates else set()
    others = [name for name in recipe.criterion.features if name not in of_units]
    return sorted(seen), sorted({name for feature in others for name in FEATURES[feature].sums})


def _score_body(recipe: Recipe) -> list[str]:
    """The body of `score`: what the formula looks at, and then the formula."""
    read = {name for feature in _of_units(recipe) for name in FEATURES[feature].inputs}
    made = [f"{name} = {_made(name)}" for name in sorted(read - {*_COUNTS})]
    lines = ["last = group.parts[-1]"] if any("last" in line for line in made) else []
    is_cut = any("shape" in line for line in made)
    if is_cut or read & {*_COUNTS}:
        lines = ["last = group.parts[-1]", "seen = stats[last.name]"]
    if is_cut:
        lines = [*lines, "shape = (group.units, last.width)"]
    lines += made
    lines += [f"{name} = {_feature(name)}" for name in recipe.criterion.features]
    return [*lines, *torch_lines(recipe.criterion), "return score.expand(group.units, 1)[:, 0]"]


def _made(name: str) -> str:
    if name in _MADE:
        return _MADE[name]
    shape = "-1, *shape" if SUMS[name].by_sequence else "shape"
    return f'seen["{name}"].reshape({shape})'


def _feature(name: str) -> str:
    """The value of a feature of units, or of the weights of a part."""
    row = FEATURES[name]
    if row.shape != "element":
        return _with_names(row.line, {count: f'seen["{count}"]' for count in _COUNTS})
    sums = {sum: f'stats[part.name]["{sum}"]' for sum in row.sums}
    line = _with_names(row.line, {"weight": "matrix(part.module)", **sums})
    return f"turned(part, group.units, {line})"


def _with_names(line: str, names: dict[str, str]) -> str:
    for name, text in names.items():
        line = re.sub(rf"\b{name}\b", text, line)
    return line


def _docstring(recipe: Recipe) -> str:
    """What the page removes by which formula, in words, and how it is run."""
    several = "units of each place compete" if recipe.compare == "group" else "all units compete"
    command = "    python PAGE.py MODEL_FOLDER TEXT_FILE --sparsity 0.2 --output PRUNED_FOLDER"
    python = "    prune_(model, batches, sparsity=0.2, slice=True)"
    return page_docstring(
        recipe,
        _WHAT[recipe.unit.word],
        "\n".join(map(_meaning, recipe.criterion.features)),
        f"The lowest go; {several}. {_said(recipe)}",
        "Zeroes what goes; `slice=True` takes it out, so that matrices are smaller. Usage:",
        f"{command}\n{python}",
    )


def _meaning(name: str) -> str:
    """A line on what the formula looks at."""
    # Pages remove no parts of the depth.
    words = FEATURES[name].meaning.partition("; of a part of the depth")[0]
    return fill(f"{name:<9} {words}", 95, initial_indent=" " * 4, subsequent_indent=" " * 14)


def _said(recipe: Recipe) -> str:
    """What is done with the columns that stay."""
    told = {
        (): "What stays is not changed.",
        ("bias",): "A bias takes over what the removed gave on average.",
        ("refit",): "The columns that stay are fitted by least squares to the outputs before.",
        ("refit", "bias"): "The columns that stay and a bias are fitted by least squares to the "
        "outputs before.",
    }
    return told[recipe.updates]
