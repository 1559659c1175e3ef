"""Layers of one shape are measured in a stack, as each by itself."""

from __future__ import annotations

import pytest
import torch

from prunezero.formula.criterion import Criterion
from prunezero.models.anatomy.linears import find_linears
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.scoring.score import evaluate
from prunezero.scoring.selection import select, select_model
from prunezero.searching.evaluation.evaluator import Evaluator
from prunezero.searching.evaluation.request import Request
from prunezero.searching.proxies.layer_error import layer_error, masks_on, scores_on
from prunezero.searching.proxies.samples import Sample, grams_of, rung_sums, sample_rows, stacked
from tests.searching.testbed import make_task, tiny_space, tiny_testbed

FEATURES = ("W", "X", "G", "R1")
FORMULAS = [Criterion.parse(text) for text in ("abs(W)*X", "W**2*minmax(G)", "abs(W)/R1 + G")]


def samples_of(dtype: torch.dtype = torch.float32) -> list[Sample]:
    testbed = tiny_testbed()
    testbed.language_model.model.to(dtype)
    layers = find_linears(testbed.language_model.model)
    sums = rung_sums(FEATURES, with_gradients=True)
    return sample_rows(layers, testbed.statistics(layers, sums), FEATURES)


def one_by_one(samples: list[Sample], masks: list[torch.Tensor]) -> float:
    """The layer error as the docstring of fitness.py writes it, in float64."""
    shares = []
    for sample, mask in zip(samples, masks, strict=True):
        assert sample.gram is not None
        weight, gram = sample.features["W"].double(), sample.gram.double()
        weights = sample.row_weights.double()
        lost = torch.where(mask, 0.0, weight)
        energies = [((rows @ gram * rows).sum(1) * weights).sum() for rows in (lost, weight)]
        shares.append(float(energies[0] / energies[1]))
    return sum(shares) / len(shares)


def recipe_of(criterion: Criterion, compare: str) -> Recipe:
    return Recipe(name="it", criterion=criterion, compare=compare)


@pytest.mark.parametrize(
    ("compare", "pattern"), [("row", "free"), ("layer", "free"), ("row", "2:4")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_loses_what_its_layers_lose(compare: str, pattern: str, dtype: torch.dtype) -> None:
    samples = samples_of(dtype)
    stacks = stacked(samples)
    assert 1 < len(stacks) < len(samples)
    assert sorted(name for stack in stacks for name in stack.names) == sorted(
        sample.name for sample in samples
    )
    for criterion in FORMULAS:
        own = []
        for sample in samples:
            read = {name: sample.features[name] for name in criterion.features}
            scores = evaluate(criterion, read, sample.features["W"].shape)
            own.append(select(scores, 0.5, compare=compare, pattern=pattern))
        found = layer_error(stacks, masks_on(stacks, recipe_of(criterion, compare), 0.5, pattern))
        # In bfloat16 a product is rounded to three digits, and a sum of many to more.
        assert found == pytest.approx(
            one_by_one(samples, own), rel=1e-5 if dtype.itemsize == 4 else 0.01
        )


def test_all_layers_compete_across_stacks() -> None:
    stacks = stacked(samples_of())
    kept = masks_on(stacks, recipe_of(FORMULAS[0], "model"), 0.5, "free")
    scores = [stack.weight.abs() * stack.features["X"] for stack in stacks]
    assert all(map(torch.equal, kept, select_model(scores, 0.5)))
    assert sum(int(mask.sum()) for mask in kept) == sum(s.numel() - s.numel() // 2 for s in scores)


def test_layers_that_read_the_same_inputs_share_one_short_gram_matrix() -> None:
    samples = samples_of(torch.bfloat16)
    grams = {sample.gram.data_ptr() for sample in samples if sample.gram is not None}
    assert {sample.gram.dtype for sample in samples if sample.gram is not None} == {torch.bfloat16}
    # q, k and v read the same, gate and up do: four matrices for seven layers of a block.
    assert 7 * len(grams) == 4 * len(samples)


def requests() -> list[Request]:
    task = make_task(tiny_space(), 0.5)
    texts = ["abs(W)*X", "matrix_mean(X)", "W**2*minmax(G)", "abs(W)*G"]  # one ranks nothing
    asked = [Request.of(task.recipe(Criterion.parse(text), "it")) for text in texts]
    return [*asked[:3], Request.of(Recipe.load("wanda"), ("search",)), asked[3]]


def plain(result: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in result.items() if key not in ("seconds", "elapsed")}


def test_many_answers_are_those_to_each_question_alone() -> None:
    evaluator = Evaluator(make_task(tiny_space(), 0.5, also="2:4"), [tiny_testbed()])
    together = [plain(result) for result in evaluator.results(requests())]
    assert together == [plain(evaluator.result(request)) for request in requests()]
    assert "fault" in together[1] and "layer_error" in together[4]


def test_memory_too_short_for_all_formulas_together_is_no_fault_of_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluator = Evaluator(make_task(tiny_space(), 0.5), [tiny_testbed()])
    expected = [plain(result) for result in evaluator.results(requests())]

    def greedy(stacks: object, criteria: list[Criterion]) -> object:
        if len(criteria) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield from scores_on(stacks, criteria)  # type: ignore[arg-type]

    monkeypatch.setattr("prunezero.searching.proxies.layer_error.scores_on", greedy)
    assert [plain(result) for result in evaluator.results(requests())] == expected


@pytest.mark.parametrize("side_by_side", [False, True])
def test_layers_that_share_a_gram_matrix_share_its_product(side_by_side: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    one, two, three = torch.randn(3, 5, 5, generator=generator)
    layers = [one, one, two, three, three]
    inputs = torch.randn(5, 2, 5, generator=generator)
    grams = grams_of(layers, side_by_side=side_by_side)
    expected = torch.stack([rows @ gram for rows, gram in zip(inputs, layers, strict=True)])
    torch.testing.assert_close(grams.times(inputs), expected)
    assert sum(len(matrices) for matrices, _ in grams.batches) == 3
    assert len(grams.batches) == (2 if side_by_side else 3)
    if not side_by_side:
        assert [matrices.data_ptr() for matrices, _ in grams.batches] == [
            gram.data_ptr() for gram in (one, two, three)
        ]
