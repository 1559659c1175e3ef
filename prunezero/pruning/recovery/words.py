"""Recovery: how is some of what pruning cost won back by a little training?

Each word of a recipe's `recover` is one objective with one parametrisation. Next-token training of
the weights that stay, between pruning steps of growing sparsity, is Prune and Tune, Syed et al.
2023 (ICLR Tiny Papers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from prunezero.models.anatomy.linears import Linear, find_linears, refuse_stacks
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.calibration import Progress
from prunezero.pruning.recipes.training_options import Distil, Lora, Stepwise, Training, Tune
from prunezero.pruning.recipes.word_options import Options
from prunezero.pruning.recovery.answers import DenseAnswers, dense_answers
from prunezero.pruning.recovery.factors import train_factors
from prunezero.pruning.recovery.mixture import Mixture, mixture_of
from prunezero.pruning.recovery.objectives import NextToken, ToDense
from prunezero.pruning.recovery.training import Choices, TrainingReport, train
from prunezero.pruning.recovery.weights import train_weights


@dataclass(frozen=True)
class OfDense:
    """What a recovery knows of the dense model and of its text, once the model is pruned."""

    answers: DenseAnswers | None = None
    """that it learns from, where it does"""
    mixture: Mixture | None = None
    """the sources of the text, where there are several"""


def no_training(
    language_model: LanguageModel,
    layers: Sequence[Linear],
    windows: Tensor,
    options: Options,
    **choices: object,
) -> TrainingReport:
    """Leave the weights as they are; takes what the others take."""
    return TrainingReport()


def tune(
    language_model: LanguageModel,
    layers: Sequence[Linear],
    windows: Tensor,
    options: Tune,
    *,
    answers: DenseAnswers | None = None,
    **choices: Any,
) -> TrainingReport:
    """Train the weights of some layers on the next token, as `train` does; no answers are used."""
    choice = Choices(NextToken(), train_weights)
    return train(language_model, layers, windows, options, choice, **choices)


def lora(
    language_model: LanguageModel,
    layers: Sequence[Linear],
    windows: Tensor,
    options: Lora,
    *,
    answers: DenseAnswers | None = None,
    **choices: Any,
) -> TrainingReport:
    """Train low-rank factors of some layers on the next token, and merge them; see `train`."""
    choice = Choices(NextToken(), partial(train_factors, options=options))
    return train(language_model, layers, windows, options, choice, **choices)


def distil(
    language_model: LanguageModel,
    layers: Sequence[Linear],
    windows: Tensor,
    options: Distil,
    *,
    answers: DenseAnswers | None,
    **choices: Any,
) -> TrainingReport:
    """Train some layers towards the dense model; see `train`.

    Args:
        answers: of the dense model on the same windows, as `dense_answers` made them by the same
            options.
    """
    assert answers is not None  # whoever calls by the word's row made them; for the type checker
    factors = partial(train_factors, options=options)
    choice = Choices(
        ToDense(answers, options), train_weights if options.through == "weights" else factors
    )
    return train(language_model, layers, windows, options, choice, **choices)


def layers_trained(
    language_model: LanguageModel, pruned: Sequence[Linear], options: Options
) -> list[Linear]:
    """The layers that a recovery trains: those that are pruned, or those it names itself.

    Raises:
        ModelError: a pattern matches nothing, or low-rank factors are for experts.
    """
    if not isinstance(options, Stepwise):
        return list(pruned)
    layers = find_linears(language_model.model, targets=options.targets)
    if isinstance(options, Lora) or options.model_dump().get("through") == "lora":
        refuse_stacks(layers, "low-rank factors do")
    return layers


def known_of_dense(
    language_model: LanguageModel,
    options: Options,
    windows: Tensor | None,
    sources: Sequence[str] = (),
    progress: Progress | None = None,
) -> OfDense:
    """What a recovery needs to know of the dense model and of its text.

    Args:
        language_model: dense still.
        windows: calibration token ids [count, length].
        sources: of each window, by name; none where there is one.

    Raises:
        TextError, ModelError: as `dense_answers`.
    """
    if windows is None or not isinstance(options, Training):
        return OfDense()
    answers = None
    if isinstance(options, Distil):
        count = len(dict.fromkeys(sources))
        answers = dense_answers(language_model, windows, options, sources=count, progress=progress)
    return OfDense(answers, mixture_of(language_model, windows, sources, options, progress))
