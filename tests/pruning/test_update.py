"""Masks and mended weights of whole models against the published algorithms, done by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.compare import RecipeRunner
from prunezero.pruning.prune import prune, prune_layers
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.word_options import Dsnot
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.updates import mend as update
from prunezero.pruning.updates import obs
from prunezero.scoring.statistics import Statistics
from tests.pruning.test_admm import exact_fit
from tests.pruning.test_dsnot import slow_row
from tests.pruning.test_swaps import exchanged_by_search
from tests.scoring.reference import FORMULAS, keep_layer, keep_pattern, keep_rows
from tests.searching.testbed import tiny_testbed
from tests.tiny_models import tiny_batches, tiny_model, tiny_network, tiny_tokenizer

Array = np.ndarray[Any, Any]
# Scores [out, in] in, the keep mask of them out.
Keep = Callable[[Array], Array]
# More tokens than any tiny layer has inputs.
BATCHES = tiny_batches(8, 24)
RIA = "(abs(W) / C1 + abs(W) / R1) * sqrt(X)"


class Seen(NamedTuple):
    """A dense layer in front of which all blocks are pruned, float64."""

    weight: Array
    """[out, in]"""
    inputs: Array
    """[tokens, in]"""

    @property
    def gram(self) -> Array:
        """Per sequence."""
        return self.inputs.T @ self.inputs / len(BATCHES)


def recipe(criterion: str = "abs(W) * X", **choices: object) -> Recipe:
    return Recipe.model_validate({"name": "mine", "criterion": criterion, **choices})


def changed(name: str, **choices: object) -> Recipe:
    fields = Recipe.load(name).model_dump(by_alias=True) | choices
    return Recipe.model_validate(fields)


def model_of(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> LanguageModel:
    network = tiny_network(family, **changes).to(dtype)
    return wrap_model(network, tiny_tokenizer(), name=family)


def statistics_for(model: LanguageModel, chosen: Recipe) -> dict[str, Statistics]:
    return calibrate(model, BATCHES, find_linears(model.model), dense_sums([chosen]))


def inputs_of(network: torch.nn.Module, layers: list[Linear]) -> dict[str, Array]:
    """What the layers read while all of the text runs through the network."""
    rows: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}

    def noting(name: str) -> Any:
        return lambda module, args: rows[name].append(args[0].reshape(-1, args[0].shape[-1]))

    handles = [layer.module.register_forward_pre_hook(noting(layer.name)) for layer in layers]
    with torch.no_grad():
        for ids in BATCHES:
            network(ids[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double().numpy() for name, parts in rows.items()}


def walk_by_hand(dense: LanguageModel, pruned: LanguageModel) -> dict[str, Seen]:
    """Block by block: what its dense layers read, the blocks before it being those of `pruned`."""
    network = copy.deepcopy(dense.model)
    after = {layer.name: layer.weight for layer in find_linears(pruned.model)}
    found: dict[str, Seen] = {}
    for _, members in groupby(find_linears(network), key=lambda layer: layer.block):
        inside = list(members)
        inputs = inputs_of(network, inside)
        for layer in inside:
            found[layer.name] = Seen(layer.weight.double().numpy().copy(), inputs[layer.name])
            layer.weight.copy_(after[layer.name])
    return found


def values_of(seen: Seen, factor: Array) -> dict[str, Array]:
    """The features of the inputs, [1, in] each, by the names of the vocabulary."""
    diagonal = np.diag(seen.gram)
    inverse = (factor**2).sum(0)
    known = {"X": np.sqrt(diagonal), "H": diagonal, "V": inverse, "U": np.diag(factor)}
    return {name: value[None] for name, value in known.items()}


def factor_by_hand(gram: Array, damping: float = 0.01) -> Array:
    gram = gram + damping * np.diag(gram).mean() * np.eye(len(gram))
    return np.linalg.cholesky(np.linalg.inv(gram)).T


def obs_by_hand(
    seen: Seen, formula: Callable[[dict[str, Array]], Array], keep: Keep, group: int | None = None
) -> Array:
    """Algorithm 1 of SparseGPT, one column after another, every later column mended at once.

    Args:
        group: columns chosen together; None chooses all on the dense weights.
    """
    weight, factor = seen.weight.copy(), factor_by_hand(seen.gram)
    values, columns = values_of(seen, factor), weight.shape[1]
    kept = np.ones(weight.shape, dtype=bool)
    for column in range(columns):
        if column % (group or columns) == 0:
            inside = slice(column, column + (group or columns))
            kept[:, inside] = keep(formula({"W": weight, **values})[:, inside])
        error = np.where(kept[:, column], 0.0, weight[:, column]) / factor[column, column]
        weight[:, column:] -= np.outer(error, factor[column, column:])
        weight[~kept[:, column], column] = 0.0
    return weight


def half_of_layer(scores: Array) -> Array:
    return keep_layer(scores, "0.5")


def half_of_rows(scores: Array) -> Array:
    return keep_rows(scores, "0.5")


def two_of_four(scores: Array) -> Array:
    return keep_pattern(scores, 2, 4)


def assert_mended(model: LanguageModel, expected: Mapping[str, Array]) -> None:
    """Masks are those expected to a weight, and values to the rounding of their dtype."""
    tolerance = 1e-3 if model.dtype == torch.float32 else 1e-2
    for layer in find_linears(model.model):
        if layer.name in expected:
            found, wanted = layer.weight.double().numpy(), expected[layer.name]
            assert np.array_equal(found != 0, wanted != 0), layer.name
            np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize(
    ("compare", "pattern", "group", "keep"),
    [
        ("128 columns", "free", 128, half_of_layer),
        ("8 columns", "free", 8, half_of_layer),
        ("24 columns", "free", 24, half_of_layer),
        ("128 columns", "2:4", 4, two_of_four),
    ],
)
@pytest.mark.parametrize("name", ["sparsegpt", "isc"])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.float32)],
)
def test_a_whole_model_equals_the_published_algorithm(
    family: str,
    dtype: torch.dtype,
    name: str,
    compare: str,
    pattern: str,
    group: int,
    keep: Keep,
) -> None:
    model, dense = model_of(family, dtype), model_of(family, dtype)
    chosen = changed(name, compare=compare, pattern=pattern)
    prune(model, chosen, 0.5, windows=BATCHES)
    assert_mended(
        model,
        {
            layer: obs_by_hand(seen, FORMULAS[name], keep, group)
            for layer, seen in walk_by_hand(dense, model).items()
        },
    )


def minmax_times_input(values: dict[str, Array]) -> Array:
    magnitudes = np.abs(values["W"])
    return (magnitudes - magnitudes.min()) / np.ptp(magnitudes) * values["X"]


@pytest.mark.parametrize(
    ("compare", "pattern", "group", "keep"),
    [("8 columns", "free", 8, half_of_layer), ("row", "2:4", 4, two_of_four)],
)
@pytest.mark.parametrize(
    ("criterion", "formula"),
    [(RIA, FORMULAS["ria"]), ("minmax(abs(W)) * X", minmax_times_input)],
)
def test_sums_over_rows_and_layers_follow_the_weights_as_mended_so_far(
    criterion: str,
    formula: Callable[[dict[str, Array]], Array],
    compare: str,
    pattern: str,
    group: int,
    keep: Keep,
) -> None:
    # So few columns that each error reaches all of them at once.
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16}
    model, dense = model_of("llama", **sizes), model_of("llama", **sizes)
    choices = {"compare": compare, "pattern": pattern, "update": "obs"}
    prune(model, recipe(criterion, statistics="sequential", **choices), 0.5, windows=BATCHES)
    walked = walk_by_hand(dense, model).items()
    assert_mended(model, {name: obs_by_hand(seen, formula, keep, group) for name, seen in walked})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_mask_of_rows_is_chosen_on_dense_weights_and_then_mended(family: str) -> None:
    model, dense = model_of(family), model_of(family)
    prune(model, recipe(update="obs", statistics="sequential"), 0.5, windows=BATCHES)
    walked = walk_by_hand(dense, model).items()
    wanda = FORMULAS["wanda"]
    assert_mended(model, {name: obs_by_hand(seen, wanda, half_of_rows) for name, seen in walked})


def wanda_mask(seen: Seen) -> Array:
    norm = np.sqrt(np.diag(seen.gram))
    return half_of_rows(np.abs(seen.weight) * norm)


ONE_LAYER: dict[str, Any] = {"statistics": "sequential", "targets": ["re:1.*o_proj"]}


def seen_by_one_layer(model: LanguageModel, chosen: Recipe) -> tuple[str, Seen]:
    """Prunes the model, and returns the name of its one pruned layer with what that saw."""
    dense = tiny_model("llama")
    prune(model, chosen, 0.5, windows=BATCHES)
    (layer,) = find_linears(model.model, targets=chosen.targets)
    return layer.name, walk_by_hand(dense, model)[layer.name]


def test_weights_are_mended_on_the_mask_that_exchanges_leave() -> None:
    model = tiny_model("llama")
    chosen = recipe(update=[{"swaps": {"swaps": 2}}, "obs"], **ONE_LAYER)
    name, seen = seen_by_one_layer(model, chosen)
    first = wanda_mask(seen)
    better = np.stack(
        [
            exchanged_by_search(row, kept, seen.gram, 2, None)
            for row, kept in zip(seen.weight, first, strict=True)
        ]
    )
    assert not np.array_equal(better, first)
    assert_mended(model, {name: obs_by_hand(seen, FORMULAS["wanda"], lambda scores: better)})


def test_weights_are_fitted_again_on_the_mask_that_dsnot_leaves() -> None:
    model = tiny_model("llama")
    options = {"cycles": 4, "threshold": 0.01}
    fit = {"admm": {"iterations": 3000}}
    name, seen = seen_by_one_layer(model, recipe(update=[{"dsnot": options}, fit], **ONE_LAYER))
    first = wanda_mask(seen)
    mean = seen.inputs.sum(0) / len(BATCHES)
    moments = (mean, seen.inputs.var(0), np.sqrt(np.diag(seen.gram)))
    refined = np.stack(
        [
            slow_row(row, kept, moments, Dsnot.model_validate(options), 0)
            for row, kept in zip(seen.weight, first, strict=True)
        ]
    )
    assert not np.array_equal(refined, first)
    weight, mask, gram = map(torch.from_numpy, (seen.weight, refined, seen.gram))
    assert_mended(model, {name: exact_fit(weight, mask, gram, 0.1)})


@pytest.mark.parametrize("choices", [{"compare": "8 columns"}, {"pattern": "2:4"}, {}])
@pytest.mark.parametrize("criterion", ["W**2 / U**2", RIA])
def test_layers_that_read_the_same_inputs_are_swept_together_with_the_same_result(
    criterion: str, choices: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    together, apart = tiny_model("llama"), tiny_model("llama")
    chosen = recipe(criterion, update="obs", **choices)
    ratios = {layer.name: 0.5 for layer in find_linears(together.model)}
    if not choices.get("pattern"):
        ratios |= {name: 0.25 for name in ratios if "k_proj" in name or "up_proj" in name}
    heights: list[int] = []

    def noting(weight: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        heights.append(len(weight))
        return obs.sweep(weight, *arguments, **named)

    monkeypatch.setattr(update, "sweep", noting)
    prune_layers(chosen, find_linears(together.model), statistics_for(together, chosen), ratios)
    # Queries, keys and values, then the output; gate and up, then down.
    assert heights == 2 * [32 + 16 + 16, 32, 64 + 64, 32]
    known = statistics_for(apart, chosen)
    for layer in find_linears(apart.model):
        prune_layers(chosen, [layer], known, ratios)
    pairs = zip(find_linears(together.model), find_linears(apart.model), strict=True)
    for one, other in pairs:
        assert torch.equal(one.weight == 0, other.weight == 0)
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("compare", "pattern"),
    [
        ("row", "free"),
        ("layer", "free"),
        ("model", "free"),
        ("5 columns", "free"),
        ("128 columns", "free"),
        ("row", "2:4"),
        ("layer", "4:8"),
        ("8 columns", "1:4"),
    ],
)
@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16)])
def test_mended_weights_have_exactly_the_zeros_asked_for(
    family: str, dtype: torch.dtype, compare: str, pattern: str
) -> None:
    model = model_of(family, dtype)
    chosen = recipe("W**2 / U**2", compare=compare, pattern=pattern, update="obs")
    asked = None if pattern != "free" else 0.37
    prune(model, chosen, asked, statistics=statistics_for(model, chosen))
    layers = find_linears(model.model)
    for layer in layers:
        weight = layer.weight
        assert weight.dtype == dtype and bool(torch.isfinite(weight).all())
        assert not torch.signbit(weight[weight == 0]).any()
        if asked is None:
            keep, of = map(int, pattern.split(":"))
            assert bool(((weight != 0).reshape(-1, of).sum(1) == keep).all())
        elif compare != "model":
            assert_lost(weight == 0, compare)
    if compare == "model":
        total = sum(layer.weight.numel() for layer in layers)
        assert sum(int((layer.weight == 0).sum()) for layer in layers) == total * 37 // 100


def assert_lost(removed: torch.Tensor, compare: str) -> None:
    """Every comparison group lost 37 %, rounded down."""
    rows, columns = removed.shape
    width = {"row": columns, "layer": columns}.get(compare) or int(compare.split()[0])
    for block in torch.split(removed, width, dim=1):
        groups = list(block) if compare == "row" else [block]
        assert all(int(group.sum()) == group.numel() * 37 // 100 for group in groups)


def with_strong_layers(family: str) -> LanguageModel:
    """A tiny model with biases and weights so large that their outputs stand out from rounding."""
    model, generator = tiny_model(family), torch.Generator().manual_seed(7)
    for layer in find_linears(model.model):
        layer.weight.mul_(10)
        if layer.bias is not None:
            layer.bias.normal_(generator=generator)
    return model


def output_means(model: LanguageModel, means: Mapping[str, Array]) -> dict[str, Array]:
    found = {}
    for layer in find_linears(model.model):
        bias = 0.0 if layer.bias is None else layer.bias.double().numpy()
        found[layer.name] = layer.weight.double().numpy() @ means[layer.name] + bias
    return found


@pytest.mark.parametrize(
    "choices",
    [
        {"update": "bias"},
        {"update": ["obs", "bias"], "compare": "8 columns"},
        {"update": ["dsnot", "admm", "bias"]},
        {"update": ["swaps", "bias"], "pattern": "2:4"},
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_biases_keep_the_mean_output_of_every_layer(family: str, choices: dict[str, Any]) -> None:
    model = with_strong_layers(family)
    layers = find_linears(model.model)
    means = {name: rows.mean(0) for name, rows in inputs_of(model.model, layers).items()}
    dense = output_means(model, means)
    before = {layer.name: layer.weight.clone() for layer in layers}
    chosen = recipe(**choices)
    prune(model, chosen, 0.5, statistics=statistics_for(model, chosen))
    for name, mean in output_means(model, means).items():
        np.testing.assert_allclose(mean, dense[name], rtol=0, atol=2e-5)
    lost = [
        (before[layer.name] - layer.weight).double().numpy() @ means[layer.name] for layer in layers
    ]
    assert max(np.abs(change).max() for change in lost) > 0.1


class StopError(Exception):
    """Ends a pruning from outside."""


@pytest.mark.parametrize("update_", ["bias", "obs", ["obs", "bias"]])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_dense_model_comes_back_after_every_measurement(family: str, update_: Any) -> None:
    testbed = tiny_testbed(family)
    network, ids = testbed.language_model.model, testbed.windows("validation")

    def logits() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = network(ids).logits
        return found

    def stop(what: str, done: int, total: int) -> None:
        raise StopError

    settings, names = network.config.to_dict(), list(network.state_dict())
    dense, chosen = logits(), recipe(update=update_)
    known = testbed.statistics(find_linears(network), dense_sums([chosen]))
    runner = RecipeRunner(testbed, known)
    rows = [runner.row(chosen, 0.5, ["validation"]) for _ in range(2)]
    assert torch.equal(logits(), dense)
    assert rows[0]["kl"] == rows[1]["kl"] > 0
    with pytest.raises(StopError):
        runner.row(chosen, 0.5, ["validation"], progress=stop)
    assert torch.equal(logits(), dense)
    # Biases that an update opened would be counted with every later recipe.
    assert network.config.to_dict() == settings and list(network.state_dict()) == names
