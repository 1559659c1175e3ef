"""Recipes of run time: keys that attention goes on without, installed for a while and measured.

    recipe + share of keys to keep -> policy -> a cache that forgets -> measured continuation

Nothing is written to weights. A recipe whose heads keep unequal numbers of keys is installed by
masks, which save no memory, and its rows say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prunezero.errors import RecipeError, StatisticsError
from prunezero.models.attending.continuing import Continuations, continued
from prunezero.models.attending.installing import Known, installed
from prunezero.models.attending.links import LinkPolicy
from prunezero.models.attending.observing import Looks
from prunezero.models.attending.policy import Policy
from prunezero.models.loading.language_model import LanguageModel
from prunezero.pruning.recipes.attention_options import Columns, Links
from prunezero.pruning.recipes.recipe import Recipe

# What the formula, or something around it, is asked about that only weights have.
_OF_WEIGHTS = ("statistics", "targets", "ignore", "pattern")

# Of a feature that calibration text tells: its field of `Measured`, what it is, and who measures.
_BEFOREHAND = {
    "EXPECTED": ("query_mean", "how queries are distributed", "query_moments"),
    "STREAM": ("streaming_error", "how heads stream", "streaming_errors"),
}


def policy_of(recipe: Recipe, kept: float) -> Policy | LinkPolicy:
    """What a recipe does when it keeps a share of a prompt's keys.

    Args:
        kept: the share, above 0 and at most 1; of links, of those that each query sees.

    Raises:
        RecipeError: the recipe is not of keys or links, or chooses what only weights have.
        SelectionError: two ways to choose at once.
    """
    options = recipe.unit.options
    if not isinstance(options, Columns | Links):
        raise RecipeError(
            f"recipe {recipe.name} removes {recipe.unit.several} from the weights, and a recipe of "
            "unit: kv_column or link is needed here; prune by it instead"
        )
    named = [one.arrow for one in recipe.extras]
    named += [key for key in _OF_WEIGHTS if key in recipe.effect]
    if named:
        raise RecipeError(
            f"recipe {recipe.name}: {', '.join(named)} is about weights, and unit: "
            f"{recipe.unit.word} leaves those as they are; leave it out"
        )
    if isinstance(options, Links):
        numbers = options.model_dump(exclude={"when"})
        numbers |= {"at_prompt": options.when != "following", "behind": options.when != "prompt"}
        return LinkPolicy(recipe.criterion, kept, **numbers)
    if (options.spend == "heads") != (recipe.compare == "model"):
        raise RecipeError(
            f"recipe {recipe.name}: compare: model and spend: heads belong together, for heads of "
            "a whole model compete as wholes alone; name both or none"
        )
    return Policy(
        recipe.criterion,
        kept,
        together=_is_unequal(recipe.compare, options.share),
        heads=options.spend == "heads",
        first=options.formulas[0] if options.formulas else None,
        each_step=options.when == "step",
        looks=Looks(options.window, options.pool, options.lag, options.seed),
        **options.model_dump(
            include={"share", "sinks", "recent", "block", "safeguard", "falling", "first_share"}
        ),
    )


def _is_unequal(compare: str, share: str) -> bool:
    """Whether heads may keep unequal numbers of keys."""
    return compare == "model" or (compare == "layer" and share == "kv_head")


@contextmanager
def keeping(
    language_model: LanguageModel, recipe: Recipe, kept: float, known: Known | None = None
) -> Iterator[Any]:
    """Within it, the cache that it gives keeps a share of the keys of a prompt, by a recipe.

    Its tensors shrink, or are masked where heads keep unequal numbers of keys, or queries choose
    for themselves. Hand it to
    `model.generate(ids, cache=cache)`; see `models/attending/installing.py`.

    Args:
        kept: share of the prompt's keys that stay, above 0 and at most 1.
        known: what was measured beforehand, for EXPECTED (`query_moments`), ATT_READ
            (`reread_attention`) and ATT_NEXT, all of `models/attending/observing.py`.

    Raises:
        RecipeError, SelectionError: as `policy_of`.
        ModelError: the model has no attention that a recipe can be installed in.
    """
    with installed(language_model, policy_of(recipe, kept), known) as session:
        yield session.cache


def kept_row(
    language_model: LanguageModel,
    recipe: Recipe,
    kept: float,
    texts: Mapping[str, Continuations],
    known: Known | None = None,
) -> dict[str, Any]:
    """What a model is worth that keeps a share of the keys of each prompt, by a recipe.

    Of each text by name: perplexity, KL and the other measures to the dense model, and losses of
    windows; over all, bytes of keys and values behind the prompt, those of the dense model, and the
    share of links behind the prompt that were computed.

    Args:
        kept: share of the prompt's keys that stay, above 0 and at most 1.
        texts: prompts and what follows them, read densely before (`read_densely`).
        known: of calibration text, how queries are distributed (`query_moments`), and how heads
            stream (`streaming_errors`).

    Raises:
        RecipeError, SelectionError: as `policy_of`.
        StatisticsError: the formula looks at what was not measured.
        ModelError: the model has no attention that a recipe can be installed in.
    """
    policy = policy_of(recipe, kept)
    for feature, (field, what, by) in _BEFOREHAND.items():
        held = [getattr(one, field) is not None for one in (known or {}).values()]
        if feature in policy.features and not any(held):
            raise StatisticsError(
                f"recipe {recipe.name} looks at {what}, which has to be measured on calibration "
                f"text by {by}"
            )
    row: dict[str, Any] = {"recipe": recipe.name, "kept": kept, "signal": policy.signal}
    row |= {"simulated": policy.is_simulated, "seconds": 0.0}
    for name, text in texts.items():
        found = continued(language_model, policy, text, known or {})
        row |= {f"{name}_{key}": value for key, value in found.measures.items()}
        row |= {"kv_bytes": found.bytes_held, "dense_kv_bytes": found.dense_bytes}
        row |= {"links": found.links}
        row["seconds"] += found.seconds
    return row
