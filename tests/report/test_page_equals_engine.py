"""Of random recipes, the page and the engine prune the same weights and refuse the same ones.

    PRUNEZERO_RANDOM_RECIPES=3000 python -m pytest -s tests/report/test_page_equals_engine.py

runs that many from text to weights on tiny models, and as many on bare matrices, each of those with
seven requests.
"""

from __future__ import annotations

import functools
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunezero.errors import OutputError, PruneZeroError, RecipeError
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.words import WORDS
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.testbed import with_choices
from prunezero.report.export.page import no_page, pruner_page
from prunezero.scoring.statistics import SUMS, Statistics
from tests.report.random_recipes import Request, random_recipe, random_request
from tests.tiny_models import FAMILIES, tiny_batches, tiny_model

# Random formulas are simplified here and there, which is told.
pytestmark = pytest.mark.filterwarnings("ignore::prunezero.errors.FormulaWarning")
COUNT = int(os.environ.get("PRUNEZERO_RANDOM_RECIPES", "60"))
# The seed of the stand with numbers that are none.
LAST = 7
BARE = max(240, COUNT)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Attention(nn.Module):
    def __init__(self, shared: nn.Linear | None) -> None:
        super().__init__()
        self.q_proj = shared or nn.Linear(24, 6)
        self.k_proj = nn.Linear(24, 1, bias=False)
        self.c_attn = Conv1D(5, 24)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 7) for _ in range(2))


class Block(nn.Module):
    def __init__(self, shared: nn.Linear | None, *, width: int, is_mixed: bool) -> None:
        super().__init__()
        self.attn = Attention(shared)
        self.up = nn.Linear(24, 3)
        self.down = Conv1D(4, width) if shared else nn.Linear(16, 2)
        if is_mixed:
            self.mlp = Mixture()


class Matrices(nn.Module):
    """The layers of a model, of odd shapes, without a forward pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first = Block(None, width=width, is_mixed=False)
        shared = Block(first.attn.q_proj, width=width, is_mixed=True)
        self.embed = nn.Embedding(10, 24)
        self.layers = nn.ModuleList([first, shared])
        self.head = nn.Linear(24, 10)


def coarse(*shape: int, generator: torch.Generator) -> Tensor:
    """Numbers with many ties and zeros."""
    return (torch.randn(*shape, generator=generator) * 3).round() / 8


def seen(layer: Any, generator: torch.Generator, *, tokens: int) -> Statistics:
    """Every sum of a layer over made-up inputs, some channels of which are dead."""
    rows, columns = layer.weight.shape
    inputs = coarse(2, tokens, columns, generator=generator)
    inputs[..., torch.rand(columns, generator=generator) < 0.2] = 0.0
    statistics = Statistics.empty(SUMS, rows, columns)
    statistics.add_inputs(inputs)
    statistics.add_outputs(coarse(2, tokens, rows, generator=generator))
    for _ in range(2):
        statistics.add_gradient(coarse(rows, columns, generator=generator))
    gradients = coarse(2, tokens, rows, generator=generator) + 0.001
    statistics.add_output_gradients(gradients, inputs=inputs)
    return statistics


@dataclass
class RecipeRunner:
    """A model with its statistics, pruned again and again and put back as it was."""

    model: LanguageModel
    statistics: dict[str, Statistics]
    windows: Tensor
    before: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.before = self.weights()

    def weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.model.state_dict().items()}

    @contextmanager
    def restored(self) -> Iterator[None]:
        yield
        self.model.model.load_state_dict(self.before)


def bare_runner(dtype: torch.dtype, seed: int) -> RecipeRunner:
    """Matrices alone, some with a layer of zeros, the last with numbers that are no numbers.

    In every second one the Gram matrices ask for more damping than the least.
    """
    generator = torch.Generator().manual_seed(seed)
    network = Matrices(width=33 if seed % 3 == 2 else 40)
    for place, parameter in enumerate(network.parameters()):
        parameter.requires_grad_(False)
        values = coarse(*parameter.shape, generator=generator)
        parameter.copy_(values if place % 3 else values + torch.randn(values.shape))
    layers = find_linears(network)
    statistics = {one.name: seen(one, generator, tokens=3 + 30 * (seed % 2)) for one in layers}
    if seed % 2:
        for known in statistics.values():
            diagonal = known.sums["gram"].diagonal()
            diagonal.sub_(0.05 * diagonal.mean())
        layers[1].weight.zero_()
    if seed == LAST:
        layers[2].weight[0, 3] = float("nan")
        statistics[layers[4].name].sums["input_square_sum"][1] = 1e300
    network.to(dtype)
    device = torch.device("cpu")
    model = LanguageModel(network, None, f"bare {seed}", str(seed), dtype, device)
    return RecipeRunner(model, statistics, torch.empty(0))


@functools.cache
def tiny_runner(family: str, dtype: torch.dtype) -> RecipeRunner:
    language_model = tiny_model(family)
    language_model.model.to(dtype)
    model = LanguageModel(
        language_model.model, None, family, f"{family} {dtype}", dtype, torch.device("cpu")
    )
    windows, layers = tiny_batches(3, 12), find_linears(language_model.model)
    return RecipeRunner(model, calibrate(model, windows, layers, SUMS), windows)


@dataclass(frozen=True)
class Answer:
    """What became of a request."""

    refusal: str = ""
    weights: dict[str, Tensor] = field(default_factory=dict)
    zeros: int = 0
    total: int = 0


def engine(runner: RecipeRunner, request: Request) -> Answer:
    try:
        recipe = validated(Recipe, request.recipe, "random")
        recipe = with_choices(recipe, pattern=request.pattern)
        known = of_sums(runner.statistics, dense_sums([recipe]))
        outcome = prune(runner.model, recipe, request.sparsity, statistics=known)
    except PruneZeroError as error:
        return Answer(refusal=str(error))
    return Answer("", runner.weights(), outcome.zeros, outcome.total)


def of_sums(statistics: Mapping[str, Statistics], names: frozenset[str]) -> dict[str, Statistics]:
    """As if no other sum had been collected."""
    found = {}
    for layer, known in statistics.items():
        sums = {name: known.sums[name] for name in sorted(names)}
        found[layer] = Statistics(known.tokens, known.sequences, sums)
    return found


def exported(recipe: dict[str, Any]) -> Any:
    """The names of a recipe's page; None where the recipe is refused, or no page can follow it."""
    try:
        fields = validated(Recipe, recipe, "random")
    except RecipeError:
        return None
    if no_page(fields):
        with pytest.raises(OutputError, match="cannot follow|the dense model alone"):
            pruner_page(fields)
        assert {*recipe} & {*WORDS, "statistics"}
        return None
    names: dict[str, Any] = {"__name__": "page"}
    exec(pruner_page(fields), names)
    return names


def page_answer(names: Any, runner: RecipeRunner, request: Request) -> Answer:
    choices = {} if request.pattern is None else {"pattern": request.pattern}
    try:
        report = names["prune_"](
            runner.model.model, torch.split(runner.windows, 1), request.sparsity, **choices
        )
    except names["RefusalError"] as error:
        return Answer(refusal=str(error))
    assert report["sparsity"] == report["zeros"] / report["weights"]
    return Answer("", runner.weights(), report["zeros"], report["weights"])


def stored_sums(statistics: Mapping[str, Statistics]) -> Callable[..., dict[str, Any]]:
    """What the page would have measured."""

    def measure(model: Any, layers: dict[str, Any], batches: Any) -> dict[str, Any]:
        found = {}
        for name in layers:
            known = statistics[name]
            counts = {"tokens": known.tokens, "sequences": known.sequences, "layer": name}
            found[name] = known.sums | counts
        return found

    return measure


def difference(runner: RecipeRunner, request: Request, names: Any) -> str:
    """How page and engine differ; "same", "both refuse", or the kind of fault."""
    with runner.restored():
        wanted = engine(runner, request)
    with runner.restored():
        found = page_answer(names, runner, request)
        if found.refusal:
            assert same(runner.weights(), runner.before), "a refusal changes nothing"
    if wanted.refusal or found.refusal:
        if wanted.refusal and found.refusal:
            return "both refuse"
        who = "pruned where refused" if wanted.refusal else "refused where pruned"
        return f"{who}: {wanted.refusal}{found.refusal}"
    counts = (found.zeros, found.total) == (wanted.zeros, wanted.total)
    return "same" if same(found.weights, wanted.weights) and counts else "other weights"


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Bit for bit; NaN counts as itself."""
    pairs = [(left[name], right[name]) for name in right]
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def tell(results: Counter[str], faults: list[str]) -> None:
    kinds = {"same": results["same"], "both refuse": results["both refuse"]}
    print(f"\n{results.total()} requests: {kinds}, without page: {results['no page']}")
    assert not faults, f"{len(faults)} of {results.total()}:\n" + "\n".join(faults[:5])


@pytest.fixture(autouse=True)
def versions_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the engine's time on so little."""
    monkeypatch.setattr("prunezero.pruning.prune.version", functools.cache(version))


def test_masks_counts_and_refusals_on_bare_matrices_of_odd_shapes() -> None:
    stands = [bare_runner(dtype, seed) for seed in range(LAST + 1) for dtype in DTYPES]
    names = list(stands[0].statistics)
    results: Counter[str] = Counter()
    faults = []
    for seed in range(BARE):
        rng = random.Random(f"bare {seed}")
        recipe = random_recipe(rng, names)
        page = exported(recipe)
        if page is None:
            results["no page"] += 1
            continue
        for _ in range(7):
            runner, request = rng.choice(stands), random_request(rng, recipe)
            page["measure"] = stored_sums(runner.statistics)
            results[told := difference(runner, request, page)] += 1
            if told not in ("same", "both refuse"):
                faults.append(f"{seed}: {request} on {runner.model.name} {told}")
    tell(results, faults)
    assert results["same"] > BARE and results["both refuse"] > BARE


def test_masks_counts_and_refusals_from_text_to_weights() -> None:
    results: Counter[str] = Counter()
    faults = []
    for seed in range(COUNT):
        rng = random.Random(f"whole {seed}")
        runner = tiny_runner(rng.choice(FAMILIES), rng.choice(DTYPES))
        recipe = random_recipe(rng, list(runner.statistics))
        page, request = exported(recipe), random_request(rng, recipe)
        if page is None:
            results["no page"] += 1
            continue
        results[told := difference(runner, request, page)] += 1
        if told not in ("same", "both refuse"):
            faults.append(f"{seed}: {request} on {runner.model.name} {told}")
    tell(results, faults)
    assert results["same"] > COUNT // 4
