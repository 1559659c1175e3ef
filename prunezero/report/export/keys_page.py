"""A recipe of keys as one page of plain torch: importing it registers an attention with a model.

`keys_template.py` is a real program that is tested as it stands; export exchanges its constants and
its formula. Keys that went are hidden by masks, so the page shows what a criterion is worth and
saves no memory; what shrinks a cache stays in prunezero.
"""

from __future__ import annotations

import re
from pathlib import Path

from prunezero.errors import OutputError
from prunezero.files.atomic import write_text
from prunezero.formula.code import torch_lines
from prunezero.formula.criterion import Criterion
from prunezero.formula.features import FEATURES
from prunezero.pruning.recipes.attention_options import Columns
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.report.export.page_folding import needed
from prunezero.report.export.page_text import check_page, exchange
from prunezero.report.export.page_words import page_docstring
from prunezero.report.quoting import python_string

TEMPLATE = Path(__file__).with_name("keys_template.py")
# Share of keys where nothing says how many the recipe was searched for.
USUAL_SHARE = 0.25
# What the text of a feature reads, and how a page makes it.
_MADE = {
    "keys": "keys",
    "values": "values",
    "positions": "places(keys)",
    "ages": "keys.shape[1] - 1 - places(keys)",
    "window_attention": "observed(queries, keys, numbers)",
    "last_attention": "attention(queries[:, -1:], keys, numbers)[:, 0]",
}
# Numbers of a recipe that a page follows.
_FOLLOWED = {"sinks", "recent", "window", "pool", "share"}


def write_keys(recipe: Recipe, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        OutputError: a page cannot follow the recipe, or the file cannot be written.
    """
    write_text(keys_page(recipe), path)


def keys_page(recipe: Recipe) -> str:
    """The page's text: it compiles, and it imports nothing of prunezero.

    Raises:
        OutputError: a page cannot follow the recipe.
    """
    options = recipe.unit.options
    reason = _unfit(recipe)
    if reason or not isinstance(options, Columns):
        raise OutputError(
            f"{recipe.name} has {reason}, which one page of attention cannot follow; install it by "
            "prunezero.pruning.attention.keeping"
        )
    new = {
        "NAME": python_string(re.sub(r"\W", "_", recipe.name)),
        "KEPT": python_string(f"{recipe.provenance.get('kept', USUAL_SHARE):g}"),
        "SINKS": repr(options.sinks),
        "RECENT": repr(options.recent),
        "WINDOW": repr(options.window),
        "POOL": repr(options.pool),
        "SHARED": repr(options.share == "layer"),
        "score": _score_body(recipe.criterion),
    }
    page = needed(exchange(TEMPLATE.read_text(encoding="utf-8"), new, _docstring(recipe)), ())
    check_page(page)
    return page


def _unfit(recipe: Recipe) -> str:
    """What of a recipe a page does not follow; nothing where it follows all."""
    if recipe.unit.word != "kv_column":
        return f"unit: {recipe.unit.text}"
    numbers = recipe.unit.options.model_dump(exclude_defaults=True)
    others = sorted(set(numbers) - _FOLLOWED)
    read = {one for name in recipe.features for one in FEATURES[name].inputs}
    unknown = [name for name in recipe.features if not set(FEATURES[name].inputs) <= set(_MADE)]
    found = [] if recipe.compare == "kv_head" else [f"compare: {recipe.compare}"]
    found += [f"{key}: {numbers[key]}" for key in others]
    return ", ".join([*found, *(unknown if read - set(_MADE) else [])])


def _score_body(criterion: Criterion) -> list[str]:
    """The body of `score`: what features read, the features, and the formula of them."""
    rows = [FEATURES[name] for name in criterion.features]
    read = dict.fromkeys(one for row in rows for one in row.inputs)
    lines = [f"{one} = {_MADE[one]}" for one in read if _MADE[one] != one]
    lines += [f"{row.name} = ({row.torch}).float().expand(keys.shape[:2])[:, None]" for row in rows]
    return [*lines, *torch_lines(criterion), "return score"]


def _docstring(recipe: Recipe) -> str:
    name = re.sub(r"\W", "_", recipe.name)
    usage = (
        "    import PAGE  # registers the attention\n"
        f'    model.set_attn_implementation("{name}")\n'
        "    model.generate(ids)"
    )
    return page_docstring(
        recipe,
        "leave keys of a prompt out of attention",
        "Of each prompt that is read into an empty cache KEPT keys stay, and what follows attends "
        "to those alone, by masks: no memory is saved. Usage:",
        usage,
    )
