"""Testbed: a model loaded once, calibrated once, pruned and restored many times.

Everything that compares recipes works here, so that every number of a table is measured on the
same text, at the same sequence length, from the same dense model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from prunezero.errors import PruneZeroWarning
from prunezero.files.cache import cache_dir
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.editing.zeroing import DenseWeights
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.loading.load import load_model
from prunezero.models.observing.calibration import Progress, calibrate, calibrate_on_disk
from prunezero.models.text.splits import Text, load_text, unseen_windows, windows
from prunezero.models.text.windows import begin_with
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.staged import AnyRecipe
from prunezero.scoring.statistics import Statistics


@dataclass(frozen=True)
class Settings:
    """How much text is used, cut how long, and which part of it."""

    sequence_length: int = 256
    """tokens in a window, for calibration and evaluation alike"""
    calibration_tokens: int = 8192
    """tokens that statistics are made from"""
    evaluation_tokens: int = 4096
    """tokens of each of the splits search and validation"""
    test_tokens: int = 8192
    """tokens of the test split"""
    seed: int = 0
    """which windows of the calibration split are drawn"""

    def tokens(self, split: str) -> int:
        """How many tokens of a split are used."""
        named = {"calibration": self.calibration_tokens, "test": self.test_tokens}
        return named.get(split, self.evaluation_tokens)


@dataclass(frozen=True)
class Testbed:
    """A model, and the text that it is calibrated with and measured on."""

    language_model: LanguageModel
    """dense, except while a recipe is being measured"""
    text: Text
    """documents by split"""
    settings: Settings
    """how much of the text is used"""
    is_reversed: bool = False
    """whether calibration windows come last to first: the same sums, up to rounding"""
    gradient_bytes: int | None = None
    """None keeps sums and a copy of the dense weights in memory; else they are read from files, to
    the last bit the same, and of gradient sums so many bytes are in memory while they are made"""

    @property
    def begin_with(self) -> str:
        """What the tokenizer begins every window with, such as "<bos>"; empty for most models."""
        return begin_with(self.language_model.tokenizer)

    @cached_property
    def _cut(self) -> dict[str, Tensor]:
        """The windows of each split that was asked for: a long split takes seconds to tokenize."""
        return {}

    @cached_property
    def _draws(self) -> dict[int, Testbed]:
        """The testbeds of further draws that were asked for."""
        return {}

    def windows(self, split: str) -> Tensor:
        """Token ids `[count, length]` of one split; not to be changed.

        Raises:
            TextError: the split is too short for the settings.
        """
        if split not in self._cut:
            self._cut[split] = self._windows(split)
        return self._cut[split]

    def sources(self, split: str) -> tuple[str, ...]:
        """The source of each window of one split, by name; none where the text is of one source."""
        return self.text.sources(len(self.windows(split)))

    @cached_property
    def held_out(self) -> Tensor:
        """Calibration token ids `[count, length]` for trials, as many as statistics see.

        The first are windows of the calibration split that statistics do not see, as far as it has
        any; a warning says so where it has none.
        """
        length, seen = self.settings.sequence_length, self.windows("calibration")
        unseen = unseen_windows(
            self.text,
            self.language_model,
            length=length,
            count=len(seen),
            seed=self.settings.seed,
        )
        if not len(unseen):
            warnings.warn(
                f"statistics see the whole calibration split of text '{self.text.name}', so what "
                "is measured on trial is measured on the same text, where refitted columns look "
                "better than they are; use fewer calibration tokens, or more text",
                PruneZeroWarning,
                stacklevel=2,
            )
        return torch.cat([unseen, seen])[: len(seen)]

    def drawn(self, draw: int) -> Testbed:
        """The same on another draw of calibration text, counted from 0, which is this one."""
        if draw and draw not in self._draws:
            settings = replace(self.settings, seed=self.settings.seed + draw)
            self._draws[draw] = replace(self, settings=settings)
        return self._draws[draw] if draw else self

    def reversed(self) -> Testbed:
        """The same with its calibration windows in the opposite order."""
        return replace(self, is_reversed=not self.is_reversed)

    def _windows(self, split: str) -> Tensor:
        length = self.settings.sequence_length
        cut = windows(
            self.text,
            split,
            self.language_model,
            length=length,
            count=max(1, self.settings.tokens(split) // length),
            seed=self.settings.seed,
        )
        if split != "calibration" or not self.is_reversed:
            return cut
        # Those of each source among themselves, so that the first source stays the first.
        turns = max(1, len(self.text.parts))
        found = cut.clone()
        for turn in range(turns):
            found[turn::turns] = cut[turn::turns].flip(0)
        return found

    def statistics(
        self, layers: Sequence[Linear], sums: Iterable[str], progress: Progress | None = None
    ) -> Mapping[str, Statistics]:
        """Sums of the dense model by layer name, from the cache where they are known already.

        Raises:
            TextError, StatisticsError: as `calibrate`, or `calibrate_on_disk`.
        """
        text, names = (self.language_model, self.windows("calibration")), frozenset(sums)
        collect: Callable[..., Mapping[str, Statistics]] = calibrate
        if self.gradient_bytes is not None and names:
            collect = partial(calibrate_on_disk, gradient_bytes=self.gradient_bytes)
        return collect(
            *text,
            layers,
            names,
            cache=cache_dir(),
            text_fingerprint=self.text.fingerprint,
            progress=progress,
        )

    def dense_weights(self) -> DenseWeights:
        """Brings the model back, as it is now, after each edit: all layers and their biases.

        Raises:
            ModelError: a file of the model is damaged.
        """
        model = self.language_model
        source = None if self.gradient_bytes is None else model.source
        return DenseWeights(find_linears(model.model), source)


def beginning(words: Iterable[str]) -> dict[str, str]:
    """What windows begin with, as a column of results; no column where that is text alone.

    Args:
        words: `Testbed.begin_with` of each model.
    """
    named = dict.fromkeys(word or "text" for word in words)
    return {} if list(named) in ([], ["text"]) else {"windows_begin_with": " or ".join(named)}


def set_up(
    model: str | LanguageModel,
    text: str | Path,
    settings: Settings | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
) -> Testbed:
    """Load a model and text.

    Raises:
        ModelError, TextError: either cannot be loaded.
    """
    loaded = load_model(model, dtype=dtype, device=device) if isinstance(model, str) else model
    return Testbed(loaded, load_text(str(text)), settings or Settings())


@overload
def with_choices(recipe: Recipe, **choices: object) -> Recipe: ...


@overload
def with_choices(recipe: AnyRecipe, **choices: object) -> AnyRecipe: ...


def with_choices(recipe: AnyRecipe, **choices: object) -> AnyRecipe:
    """The recipe with other choices, in all its stages, checked like any recipe.

    A choice of None stays as it is.

    Raises:
        RecipeError: a choice is not a known word.
    """
    changes = {key: value for key, value in choices.items() if value is not None}
    if not isinstance(recipe, Recipe):
        return recipe.with_recipes(tuple(with_choices(one, **changes) for one in recipe.recipes))
    fields = recipe.model_dump(by_alias=True) | changes
    return validated(Recipe, fields, f"recipe {recipe.name}")
