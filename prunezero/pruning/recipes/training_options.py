"""Which numbers go with the words of a recipe's `recover`, and what may they be?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from prunezero.pruning.recipes.documents import LayerPatterns
from prunezero.pruning.recipes.word_options import Options


class Training(Options):
    """What every training after a pruning step has: an optimizer, its steps, and when to stop."""

    after: Literal["every step", "last step"] = Field(
        default="every step", description="pruning steps of the schedule that it follows"
    )
    optimizer: Literal["adamw", "adam", "sgd"] = Field(default="adamw", description="of torch")
    learning_rate: float = Field(
        default=1e-4, gt=0, le=10, description="highest, after a warm-up; falls to 0"
    )
    batch: int = Field(
        default=4,
        ge=1,
        le=4096,
        description="sequences whose gradients make one step of the optimizer",
    )
    warm_up: float = Field(
        default=0.05, ge=0, le=1, description="share of the steps over which the rate rises"
    )
    windows: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="calibration windows to train on at most; 0 is all of them",
    )
    patience: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="looks at held-out windows in a row that are no better, after which training "
        "stops and the best weights stay; 0 never looks",
    )
    every: int = Field(
        default=10, ge=1, le=1_000_000, description="steps between two looks, if there are any"
    )
    held_out: int = Field(
        default=4,
        ge=1,
        le=1_000_000,
        description="last calibration windows that are looked at, or that sources are measured on, "
        "instead of trained on, if any",
    )
    sampling: Literal["equal", "degradation"] = Field(
        default="equal",
        description="of text of several sources, which windows come: all equally often, or more of "
        "those sources whose loss grew most over the dense model's; one source has no choice",
    )
    measure_every: int = Field(
        default=20,
        ge=1,
        le=1_000_000,
        description="of sampling: degradation, steps between two measurements of all sources",
    )
    balance: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="of sampling: degradation, share of the windows that sources have equally many "
        "of, however little the loss grew",
    )
    second_stage: int = Field(
        default=0,
        ge=0,
        le=1_000,
        description="of sampling: degradation, last sources of the text that wait for a second "
        "stage, in which they come alone, as instructions behind plain text; 0 has one stage",
    )
    second_from: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="share of the steps behind which the second stage begins, if there is one",
    )

    @model_validator(mode="after")
    def _has_stages_where_it_samples(self) -> Training:
        if self.second_stage and self.sampling == "equal":
            raise ValueError(
                f"second_stage {self.second_stage} needs sampling: degradation, since equal "
                "sampling lets all windows come from the first step on"
            )
        return self

    def follows(self, step: int, steps: int) -> bool:
        """Whether it trains after one of so many pruning steps, the first of which is 0."""
        return self.after == "every step" or step == steps - 1

    def measures(self, sources: int) -> bool:
        """Whether text of so many sources is measured source by source."""
        return self.sampling == "degradation" and sources > 1

    def split(self, count: int, sources: int = 1) -> tuple[range, range]:
        """Which of so many calibration windows are trained on, and which are looked at.

        Args:
            sources: that the text has.
        """
        border = count - (self.held_out if self.patience or self.measures(sources) else 0)
        return range(max(0, min(border, self.windows or border))), range(max(0, border), count)

    def fault_of_text(self, count: int, sources: Sequence[str] = ()) -> str:
        """Why so many calibration windows are too few; nothing where they are enough.

        Args:
            sources: of each window, by name; of text of one source there may be none.
        """
        if sources and len(sources) != count:
            return f"has {count} calibration windows and the sources of {len(sources)}"
        names = tuple(dict.fromkeys(sources))
        parts = self.split(count, len(names))
        if not parts[0]:
            return (
                f"holds out {self.held_out} calibration windows and has {count}, so none is left "
                "to train on; use more text, or a smaller held_out"
            )
        return self._fault_of_sources(names, sources, parts) if self.measures(len(names)) else ""

    def _fault_of_sources(
        self, names: Sequence[str], sources: Sequence[str], parts: tuple[range, range]
    ) -> str:
        """Why the sources of a text cannot be sampled from; nothing where they can."""
        if self.second_stage >= len(names):
            return (
                f"leaves the last {self.second_stage} sources of the text to its second stage, and "
                f"the text has {len(names)}; use more sources, or a smaller second_stage"
            )
        for part, verb in zip(parts, ("train on", "hold out"), strict=True):
            there = {sources[place] for place in part}
            missing = [name for name in names if name not in there]
            if missing:
                return (
                    f"samples by degradation and has no window of source '{missing[0]}' to {verb}: "
                    f"it trains on {len(parts[0])} calibration windows and holds out the last "
                    f"{len(parts[1])}; use more text, or another held_out"
                )
        return ""


class Tune(Training):
    """Short fine-tuning of the weights that stay, after each pruning step; the mask is held."""

    sequences: int = Field(
        default=128, ge=1, le=1_000_000, description="training sequences after each pruning step"
    )

    @property
    def drawn(self) -> int:
        """How many training sequences are drawn in all."""
        return self.sequences


class Stepwise(Training):
    """Training of any linear maps of the blocks for a number of steps."""

    steps: int = Field(
        default=100, ge=1, le=1_000_000, description="of the optimizer, after each pruning step"
    )
    targets: LayerPatterns = Field(
        default=(),
        description="linear maps to train, as in the recipe's `targets`; all of the blocks, if "
        "empty, those among them that lose nothing",
    )

    @property
    def drawn(self) -> int:
        """How many training sequences are drawn in all."""
        return self.steps * self.batch


class LowRank(Options):
    """Low-rank factors, Hu et al. 2022, LoRA (ICLR), arXiv:2106.09685."""

    rank: int = Field(
        default=8, ge=1, le=4096, description="rows of A and columns of B in W + alpha / rank * BA"
    )
    alpha: float = Field(default=16.0, gt=0, le=1e6, description="scale of BA, as there")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of the inputs of A that are left out at random"
    )


class Lora(Stepwise, LowRank):
    """Low-rank changes of the weights that stay, merged into them when done."""

    learning_rate: float = Field(
        default=2e-4, gt=0, le=10, description="highest, after a warm-up; falls to 0"
    )


class Distil(Stepwise, LowRank):
    """Towards the dense model's next-token distribution, Hinton et al. 2015, arXiv:1503.02531."""

    through: Literal["weights", "lora"] = Field(
        default="weights",
        description="what is trained: the weights that stay, or low-rank factors (rank, alpha and "
        "dropout are theirs)",
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        le=100,
        description="logits of both models are divided by it, and the KL is times its square",
    )
    plain: float = Field(
        default=0.0, ge=0, le=1000, description="weight of the next-token loss beside the KL"
    )
    top: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="likeliest tokens of the dense model that are kept at each place, all others "
        "counting as one; 0 is all tokens, made of its final hidden states",
    )
    states: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="weight of the squared distance of the blocks' outputs from the dense "
        "model's, which are then all kept in memory",
    )
