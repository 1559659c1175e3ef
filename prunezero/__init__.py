"""Search for the formula that prunes your language model best.

    import prunezero as pz

    model = pz.load_model("demo")
    testbed = pz.set_up(model, "demo")
    for row in pz.compare(testbed, [pz.Recipe.load("wanda")], 0.5):
        print(row["recipe"], row["validation_perplexity"])

Everything here is imported when it is first used, so that `import prunezero` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunezero.formula.criterion import Criterion
    from prunezero.models.loading.load import load_model, save_model
    from prunezero.models.observing.calibration import calibrate
    from prunezero.pruning.compare import compare
    from prunezero.pruning.recipes.recipe import Recipe
    from prunezero.pruning.recipes.staged import load_recipe
    from prunezero.pruning.staging import prune
    from prunezero.pruning.streamed import prune_streamed
    from prunezero.pruning.testbed import Settings, Testbed, set_up
    from prunezero.searching.session import find as search
    from prunezero.searching.spaces.space import SearchSpace

__all__ = [
    "Criterion",
    "Recipe",
    "SearchSpace",
    "Settings",
    "Testbed",
    "calibrate",
    "compare",
    "load_model",
    "load_recipe",
    "prune",
    "prune_streamed",
    "save_model",
    "search",
    "set_up",
]

_HOMES = {
    "Criterion": "prunezero.formula.criterion:Criterion",
    "Recipe": "prunezero.pruning.recipes.recipe:Recipe",
    "SearchSpace": "prunezero.searching.spaces.space:SearchSpace",
    "Settings": "prunezero.pruning.testbed:Settings",
    "Testbed": "prunezero.pruning.testbed:Testbed",
    "calibrate": "prunezero.models.observing.calibration:calibrate",
    "compare": "prunezero.pruning.compare:compare",
    "load_model": "prunezero.models.loading.load:load_model",
    "load_recipe": "prunezero.pruning.recipes.staged:load_recipe",
    "prune": "prunezero.pruning.staging:prune",
    "prune_streamed": "prunezero.pruning.streamed:prune_streamed",
    "save_model": "prunezero.models.loading.load:save_model",
    "search": "prunezero.searching.session:find",
    "set_up": "prunezero.pruning.testbed:set_up",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prunezero' has no attribute '{name}'")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
