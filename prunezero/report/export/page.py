"""A criterion as one page of plain Python: the template with its formula and sums exchanged.

`pruner_template.py` is a real program that is tested as it stands. Export replaces its docstring,
its constants and three of its functions, by their places in the syntax tree, and puts the functions
of `page_parts.py` in, so the rest of the page is read and tested code.
"""

from __future__ import annotations

from pathlib import Path

from prunezero.errors import OutputError
from prunezero.files.atomic import write_text
from prunezero.formula.code import torch_lines
from prunezero.formula.criterion import Criterion
from prunezero.formula.vocabulary import FEATURES
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.report.export.expert_page import expert_page, unfit_experts
from prunezero.report.export.page_folding import needed
from prunezero.report.export.page_hooks import listen_body, read_body
from prunezero.report.export.page_lines import feature_lines
from prunezero.report.export.page_text import PARTS, check_page, exchange
from prunezero.report.export.page_words import page_docstring
from prunezero.report.export.unit_page import extras_of_units, unfit_units, unit_page
from prunezero.report.quoting import python_string, python_strings

TEMPLATE = Path(__file__).with_name("pruner_template.py")


def write_pruner(recipe: Recipe, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        OutputError: the recipe makes a choice that one page cannot follow, or the file cannot be
            written.
    """
    write_text(pruner_page(recipe), path)


def pruner_page(recipe: Recipe) -> str:
    """The page's text: it compiles, and it imports nothing of prunezero.

    Raises:
        OutputError: the recipe makes a choice that one page cannot follow.
    """
    refuse_unfit(recipe)
    if recipe.unit.word == "expert":
        return expert_page(recipe)
    if not recipe.unit.is_usual:
        return unit_page(recipe)
    source = TEMPLATE.read_text(encoding="utf-8")
    features = _features(recipe)
    sums = frozenset(name for feature in features for name in FEATURES[feature].sums)
    new = {
        "score": _score_body(recipe),
        "listen": listen_body(sums),
        "read": read_body(sums),
        "COMPARE": python_string(recipe.compare),
        "PATTERN": python_string(recipe.pattern),
        "TARGETS": python_strings(recipe.targets),
        "IGNORE": python_strings(recipe.ignore),
        "OWN": python_strings(tuple(recipe.criteria)),
        "SUMS": python_strings(tuple(sorted(sums))),
        "DAMPING": repr(recipe.damping),
        "EQUAL_IN_ROWS": repr(any(one.shape == "row" for one in recipe.formulas)),
    }
    parts = [path.read_text(encoding="utf-8") for path in PARTS]
    page = needed(exchange(source, new, _docstring(recipe)), parts)
    check_page(page)
    return page


def refuse_unfit(recipe: Recipe) -> None:
    """Raise OutputError where a page of one dense pass could not do what the recipe says."""
    reason = no_page(recipe)
    if reason:
        raise OutputError(reason)


def no_page(recipe: Recipe) -> str:
    """Why no page of one dense pass could do what the recipe says; nothing where one can."""
    is_whole = recipe.unit.is_usual or recipe.unit.word == "expert"
    extras = recipe.extras if is_whole else extras_of_units(recipe)
    units = unfit_experts(recipe) if recipe.unit.word == "expert" else []
    units = units if is_whole else unfit_units(recipe)
    found = units + [f"{choice.arrow}: {choice.text}" for choice in extras]
    if found:
        return (
            f"{recipe.name} has {', '.join(found)}, which a one-page pruner cannot follow; use "
            "`prunezero prune` with the recipe"
        )
    if recipe.statistics != "dense":
        return (
            f"{recipe.name} has statistics: {recipe.statistics}, but a one-page pruner looks at "
            "the dense model alone; add --statistics dense to export it so"
        )
    return ""


def _features(recipe: Recipe) -> list[str]:
    """All that some formula looks at, each once."""
    return list(dict.fromkeys(name for one in recipe.formulas for name in one.features))


def _score_body(recipe: Recipe) -> list[str]:
    """The body of `score`: formulas of some layers first, then that of all others."""
    lines = []
    for place, own in enumerate(recipe.criteria.values()):
        lines.append(f"if fits(OWN[{place}], layer):")
        lines += [f"    {line}" for line in _score_lines(own)]
    return [*lines, *_score_lines(recipe.criterion)]


def _score_lines(criterion: Criterion) -> list[str]:
    lines = [line for name in criterion.features for line in feature_lines(name)]
    return [*dict.fromkeys(lines), *torch_lines(criterion), "return score"]


def _docstring(recipe: Recipe) -> str:
    """The page's docstring, safe to stand between triple quotes."""
    zeros = "Zeroes the lowest scores of each group. Zeros alone make no model smaller or faster."
    command = "    python PAGE.py MODEL_FOLDER TEXT_FILE --sparsity 0.5 --output PRUNED_FOLDER"
    return page_docstring(recipe, "prune a language model", f"{zeros} Usage:", command)
