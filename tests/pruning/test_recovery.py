from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunezero.errors import OutputError, RecipeError, TextError
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from prunezero.pruning.recipes.training_options import Tune
from prunezero.pruning.recipes.word_options import Options
from prunezero.pruning.recovery import training
from prunezero.pruning.recovery.drawing import batches
from prunezero.pruning.recovery.training import OPTIMIZERS, TrainingReport
from prunezero.pruning.recovery.words import no_training, tune
from tests.pruning.trained import digest
from tests.tiny_models import FAMILIES, tiny_batches, tiny_model, tiny_network, tiny_tokenizer


def pruned(family: str = "llama", dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A tiny model of which every second weight of every layer is zero, half of them -0.0."""
    network = tiny_network(family).to(dtype)
    for layer in find_linears(network):
        layer.weight[:, ::4] = 0.0
        layer.weight[:, 2::4] = -0.0
    return wrap_model(network, tiny_tokenizer(), name=family)


def layers_of(model: LanguageModel) -> list[Linear]:
    return find_linears(model.model)


def options(**changes: Any) -> Tune:
    return Tune.model_validate({"learning_rate": 0.01, "sequences": 12, "batch": 2, **changes})


class StopError(Exception):
    """Ends a tuning from outside."""


def stop_after(steps: int) -> Any:
    def progress(what: str, done: int, total: int) -> None:
        if done == steps:
            raise StopError

    return progress


def test_every_optimizer_of_a_recipe_is_there() -> None:
    optimizers = Tune.model_json_schema()["properties"]["optimizer"]["enum"]
    assert set(optimizers) == OPTIMIZERS.keys()


def test_no_training_changes_nothing() -> None:
    model = pruned()
    before = digest(model)
    report = no_training(
        model, layers_of(model), tiny_batches(), Options(), seed=1, step=2, checkpoint=None
    )
    assert report == TrainingReport()
    assert digest(model) == before


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_loss_falls_on_text_that_can_be_memorised(optimizer: str) -> None:
    model, windows = pruned(), tiny_batches(2, 12)
    rate = 2.0 if optimizer == "sgd" else 0.02
    choices = options(optimizer=optimizer, learning_rate=rate, sequences=40, batch=2)
    report = tune(model, layers_of(model), windows, choices)
    assert len(report.losses) == 20
    # The frozen head of a random model allows no more than about 0.65 nats.
    assert report.losses[-1] < report.losses[0] - 0.15
    assert report.tokens == 40 * 12
    assert report.seconds > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_is_held_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    model = pruned(family, dtype)
    before = {layer.name: layer.weight.clone() for layer in layers_of(model)}
    tune(model, layers_of(model), tiny_batches(6, 10), options())
    for layer in layers_of(model):
        was_zero = before[layer.name] == 0
        held = layer.weight[was_zero]
        assert bool((held == 0).all()) and not bool(torch.signbit(held).any())
        assert bool((layer.weight[~was_zero] != before[layer.name][~was_zero]).any())
        assert layer.weight.dtype == dtype


def test_only_the_given_layers_train_and_nothing_is_left_behind() -> None:
    model = pruned("opt")
    first = next(model.model.parameters())
    first.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    chosen = find_linears(model.model, targets=["fc1"])
    tune(model, chosen, tiny_batches(), options())
    changed = {
        name
        for name, tensor in model.model.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed == {f"{layer.name}.weight" for layer in chosen}
    assert [parameter.requires_grad for parameter in model.model.parameters()].count(True) == 1
    assert first.requires_grad
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.model.parameters())


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_what_ends_a_tuning_early_leaves_the_model_as_it_was(error: type[BaseException]) -> None:
    model = pruned()
    before = digest(model)

    def progress(what: str, done: int, total: int) -> None:
        raise error

    with pytest.raises(error):
        tune(model, layers_of(model), tiny_batches(), options(), progress=progress)
    assert digest(model) == before
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    assert all(parameter.grad is None for parameter in model.model.parameters())


def mean_loss(network: Any, sequences: Tensor) -> Tensor:
    """Mean over sequences of the mean negative log-probability of each next token."""
    losses = []
    for ids in sequences:
        logits = network(ids[None]).logits[0].double()
        chances = logits - logits.exp().sum(-1, keepdim=True).log()
        losses.append(-torch.stack([chances[at, ids[at + 1]] for at in range(len(ids) - 1)]).mean())
    return torch.stack(losses).mean()


def reference_sgd(model: LanguageModel, batches: list[Tensor], rates: list[float]) -> None:
    """Gradient descent with momentum 0.9 and clipping, from the equations."""
    weights = [layer.module.weight for layer in layers_of(model)]
    keeps = [(weight != 0).double() for weight in weights]  # type: ignore[union-attr]
    velocities = [torch.zeros_like(keep) for keep in keeps]
    for sequences, rate in zip(batches, rates, strict=True):
        for weight in weights:
            weight.requires_grad_(True)
        gradients = torch.autograd.grad(mean_loss(model.model, sequences), weights)  # type: ignore[arg-type]
        kept = [gradient.double() * keep for gradient, keep in zip(gradients, keeps, strict=True)]
        norm = sum(float(gradient.square().sum()) for gradient in kept) ** 0.5
        scale = min(1.0, 1.0 / norm)
        for place, weight in enumerate(weights):
            assert isinstance(weight, nn.Parameter)
            weight.requires_grad_(False)
            velocities[place] = 0.9 * velocities[place] + scale * kept[place]
            weight.copy_(weight.double() - rate * velocities[place])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_steps_are_those_of_the_equations(family: str) -> None:
    model, other = pruned(family), pruned(family)
    # One window alone, so that the order cannot matter; 3 + 3 + 1 sequences.
    windows = tiny_batches(1, 9)
    choices = options(optimizer="sgd", learning_rate=2.0, sequences=7, batch=3)
    tune(model, layers_of(model), windows, choices)
    # Three steps: a warm-up of one, then linearly to 0 behind the last.
    rates = [2.0, 2.0 * 2 / 3, 2.0 * 1 / 3]
    batches = [windows.expand(size, -1) for size in (3, 3, 1)]
    reference_sgd(other, batches, rates)
    for layer, expected in zip(layers_of(model), layers_of(other), strict=True):
        torch.testing.assert_close(layer.weight, expected.weight, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    shares = [training._share_of_rate(place, 40, 0.05) for place in range(40)]
    assert shares[:3] == [0.5, 1.0, 38 / 39]
    assert shares[-1] == pytest.approx(1 / 39)
    assert [training._share_of_rate(place, 1, 0.05) for place in range(1)] == [1.0]
    assert training._share_of_rate(1, 2, 0.05) == 0.5


def test_every_window_is_used_once_before_any_comes_again() -> None:
    steps = batches(5, 12, 4, "0 0")
    assert [len(batch) for batch in steps] == [4, 4, 4]
    order = sum(steps, [])
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert order[:5] != order[5:10]
    assert len(set(order[10:])) == 2
    fewer = batches(5, 3, 2, "0 0")
    assert fewer == [order[:2], order[2:3]]


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}])
def test_seed_and_step_decide_the_order(change: dict[str, int]) -> None:
    digests = []
    for order in ({}, {}, change):
        model = pruned()
        seed, step = order.get("seed", 0), order.get("step", 0)
        tune(model, layers_of(model), tiny_batches(8, 8), options(), seed=seed, step=step)
        digests.append(digest(model))
    assert digests[0] == digests[1] != digests[2]


def test_nothing_is_dropped_out() -> None:
    models = [pruned("gpt2"), pruned("gpt2")]
    for seed, model in enumerate(models):
        assert model.model.config.resid_pdrop > 0
        torch.manual_seed(seed)
        tune(model, layers_of(model), tiny_batches(), options())
    assert digest(models[0]) == digest(models[1])


def test_small_steps_add_up_in_bfloat16() -> None:
    # Each step alone is far below the spacing of bfloat16 numbers of this size.
    model = pruned(dtype=torch.bfloat16)
    for layer in layers_of(model):
        layer.weight[layer.weight != 0] = 1.0
    tune(model, layers_of(model), tiny_batches(), options(learning_rate=1e-3, sequences=24))
    assert any(bool((layer.weight[:, 1::2] != 1.0).any()) for layer in layers_of(model))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tuning_goes_on_after_any_step_and_ends_in_the_same_bits(
    optimizer: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "KEEP_EVERY", 2)
    windows, choices = tiny_batches(4, 8), options(optimizer=optimizer, sequences=9)
    whole = pruned("gpt2", dtype)
    report = tune(whole, layers_of(whole), windows, choices, seed=3)
    for steps in range(1, len(report.losses) + 1):
        path = tmp_path / "deep" / f"{steps}.tuning"
        model = pruned("gpt2", dtype)
        with pytest.raises(StopError):
            tune(
                model,
                layers_of(model),
                windows,
                choices,
                seed=3,
                checkpoint=path,
                progress=stop_after(steps),
            )
        done: list[int] = []
        again = tune(
            model,
            layers_of(model),
            windows,
            choices,
            seed=3,
            checkpoint=path,
            progress=lambda what, place, total, done=done: done.append(place),
        )
        assert digest(model) == digest(whole)
        assert again.losses == report.losses
        kept = steps if steps == len(report.losses) else steps // 2 * 2
        assert done == list(range(kept + 1, len(report.losses) + 1))
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_finished_checkpoint_gives_the_weights_without_training(tmp_path: Path) -> None:
    path = tmp_path / "tuning"
    models = [pruned(), pruned()]
    reports = [
        tune(model, layers_of(model), tiny_batches(), options(), checkpoint=path)
        for model in models
    ]
    assert digest(models[0]) == digest(models[1])
    assert reports[0].losses == reports[1].losses
    assert reports[1].seconds >= reports[0].seconds


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"options": options(learning_rate=0.5)}, "learning_rate: 0.01, now 0.5"),
        ({"options": options(optimizer="sgd")}, "optimizer: adamw, now sgd"),
        ({"seed": 1}, "seed: 0, now 1"),
        ({"step": 1}, "step: 0, now 1"),
        ({"windows": tiny_batches(seed=1)}, "windows: "),
        ({"layers": 1}, "weights: "),
    ],
)
def test_a_checkpoint_of_another_tuning_is_refused(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    path, model = tmp_path / "tuning", pruned()
    request: dict[str, Any] = {"options": options(), "windows": tiny_batches(), "layers": None}
    layers = layers_of(model)

    def run(windows: Tensor, layers_used: int | None, **choices: Any) -> None:
        chosen = choices.pop("options")
        tune(model, layers[:layers_used], windows, chosen, checkpoint=path, **choices)

    with pytest.raises(StopError):
        tune(model, layers, tiny_batches(), options(), checkpoint=path, progress=stop_after(1))
    before = digest(model)
    changed = {**request, **change}
    with pytest.raises(OutputError, match=f"is of another tuning .*{told}"):
        run(changed.pop("windows"), changed.pop("layers"), **changed)
    assert digest(model) == before


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tuning"
    for family, refused in (("llama", False), ("mistral", True)):
        model = pruned(family)
        if refused:
            with pytest.raises(OutputError, match="is of another tuning .*model: "):
                tune(model, layers_of(model), tiny_batches(), options(), checkpoint=path)
        else:
            tune(model, layers_of(model), tiny_batches(), options(), checkpoint=path)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    path, model = tmp_path / "tuning", pruned()
    path.write_bytes(content)
    with pytest.raises(OutputError, match="is damaged, or no checkpoint of a tuning; delete it"):
        tune(model, layers_of(model), tiny_batches(), options(), checkpoint=path)
    torch.save({"something": "else"}, path)
    with pytest.raises(OutputError, match="is damaged, or no checkpoint of a tuning; delete it"):
        tune(model, layers_of(model), tiny_batches(), options(), checkpoint=path)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path, model = tmp_path / "file" / "tuning", pruned()
    told: list[str] = []
    with pytest.raises(OutputError, match=f"checkpoint {re.escape(str(path))} cannot be written"):
        tune(
            model,
            layers_of(model),
            tiny_batches(),
            options(),
            checkpoint=path,
            progress=lambda what, done, total: told.append(what),
        )
    assert not told


def test_a_loss_that_is_not_finite_is_refused_and_the_weights_come_back() -> None:
    model = pruned()
    before = digest(model)
    with pytest.raises(RecipeError, match="step [2-6] of 6: .*choose a lower learning_rate"):
        # No recipe can ask for so large a rate.
        choices = options().model_copy(update={"learning_rate": 1e30})
        tune(model, layers_of(model), tiny_batches(), choices)
    assert digest(model) == before


def test_weights_that_are_not_finite_after_the_last_step_are_refused() -> None:
    model = pruned()
    before = digest(model)
    # No recipe can ask for it; a rate so large that one step overflows is not easily found.
    choices = options(sequences=1).model_copy(update={"learning_rate": float("inf")})
    with pytest.raises(RecipeError, match="step 1 of 1: a weight is no longer finite"):
        tune(model, layers_of(model), tiny_batches(), choices)
    assert digest(model) == before


def test_a_model_that_is_broken_already_is_refused_at_step_3() -> None:
    model = pruned()
    model.model.get_input_embeddings().weight.detach()[:] = float("nan")
    with pytest.raises(RecipeError, match="step 3 of 6: the loss is nan; .*check the model"):
        tune(model, layers_of(model), tiny_batches(), options())


def test_windows_that_the_model_cannot_be_run_on_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(TextError, match="outside the vocabulary"):
        tune(model, layers_of(model), torch.full((1, 4), 1000), options())


def test_steps_are_told() -> None:
    told: list[tuple[str, int, int]] = []
    model = pruned()
    tune(
        model,
        layers_of(model),
        tiny_batches(),
        options(sequences=5),
        step=2,
        progress=lambda *step: told.append(step),
    )
    assert told == [("steps of tuning 3", place, 3) for place in (1, 2, 3)]
