"""The training loop: batches of windows, steps of an optimizer, looks at held-out windows.

What is to become small is an objective (`objectives.py`); what of the model changes for it are
weights (`weights.py`) or low-rank factors (`factors.py`). Every objective goes with either. The
mask is held: what is exactly zero before is exactly zero after every step.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.errors import PruneZeroWarning, RecipeError
from prunezero.models.anatomy.linears import Linear
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.calibration import Progress
from prunezero.models.observing.gradients import asking_anew
from prunezero.models.text.windows import check_windows
from prunezero.pruning.recipes.training_options import Stepwise, Tune
from prunezero.pruning.recovery import checkpoint as kept
from prunezero.pruning.recovery.drawing import ByDegradation, Equal, order_of
from prunezero.pruning.recovery.mixture import Mixture, SourceReport, losses_of
from prunezero.pruning.recovery.moves import HIGHEST_NORM
from prunezero.pruning.recovery.objectives import Objective
from prunezero.pruning.recovery.parts import Follower, Parametrisation

# Steps of the optimizer between two checkpoints.
KEEP_EVERY = 10
# So many steps in a row that are not finite are no accident.
MOST_SKIPPED = 3

OPTIMIZERS: dict[str, Callable[[list[Tensor], float], torch.optim.Optimizer]] = {
    # Decay would pull at weights that training is to win back.
    "adamw": lambda weights, rate: torch.optim.AdamW(weights, rate, weight_decay=0.0),
    "adam": lambda weights, rate: torch.optim.Adam(weights, rate),
    "sgd": lambda weights, rate: torch.optim.SGD(weights, rate, momentum=0.9),
}


@dataclass(frozen=True)
class TrainingReport:
    """What a training did."""

    losses: tuple[float, ...] = ()
    """the mean objective before each step of the optimizer, on that step's sequences; NaN where it
    was not finite"""
    tokens: int = 0
    """in the sequences that were trained on"""
    seconds: float = 0.0
    """elapsed, with those before an interruption"""
    skipped: tuple[int, ...] = ()
    """steps, from 1, that changed nothing, since their loss or gradient was not finite"""
    looks: tuple[tuple[int, float], ...] = ()
    """steps done by then, and the mean objective on held-out windows"""
    kept_step: int | None = None
    """of the look whose weights stayed; None without looks"""
    sources: tuple[SourceReport, ...] = ()
    """of a text of several sources, in its order"""


@dataclass(frozen=True)
class Choices:
    """The two choices that make a training: what is to become small, and what changes for it."""

    objective: Objective
    parametrised: Callable[[nn.Module, Sequence[Linear]], AbstractContextManager[Parametrisation]]
    """within it, some layers of a model are in training"""


def train(
    language_model: LanguageModel,
    layers: Sequence[Linear],
    windows: Tensor,
    options: Tune | Stepwise,
    choices: Choices,
    *,
    seed: int = 0,
    step: int = 0,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    follower: Follower | None = None,
    mixture: Mixture | None = None,
) -> TrainingReport:
    """Train the weights of some layers that are not zero, in place; all else is frozen.

    A step follows the mean objective of `options.batch` sequences, drawn without replacement until
    all windows were used; of several sources those may come more often on which the model has lost
    most (`drawing.py`). The learning rate rises linearly over the first `options.warm_up` of the
    steps and then falls linearly to 0; gradients are clipped at norm 1. Nothing decays. A step
    whose loss or gradient is not finite changes nothing. With `options.patience` the windows held
    out are looked at before the first step, after every so many, and after the last; training ends
    once that many looks in a row were no better than the best before, whose weights stay.

    Whatever ends it early, Ctrl-C included, brings back the weights from before. With a checkpoint
    the same call then goes on where the file was last written, and on a CPU ends in the same bits
    as without the interruption; a GPU adds up gradients in no fixed order.

    Args:
        language_model: pruned, in evaluation mode.
        windows: token ids [count, length].
        seed: with `step`, decides the order of the sequences, and all other chance.
        step: the pruning step that this training follows, from 0.
        checkpoint: file that keeps the state every few steps and at the end; None keeps nothing.
        progress: told (what, steps of the optimizer done, and their total).
        follower: goes along with it.
        mixture: the sources of the windows, as `mixture_of` found them; None where there is one.

    Raises:
        TextError: the model cannot be run on these ids.
        RecipeError: too few windows; or loss, gradients or weights are not finite, step after step.
        ModelError: the layers cannot be trained so.
        OutputError: the checkpoint cannot be written or read, or is of another request.
    """
    check_windows(windows, language_model)
    text = _text(windows, options, mixture, f"{seed} {step}")
    request = {"seed": seed, "step": step, **text.request}
    request |= _settings(language_model, layers, options, follower)
    model = language_model.model
    with torch.enable_grad(), _drawing(language_model, f"{seed} {step}"), _undone(layers) as before:
        if checkpoint is not None:
            request |= {"weights": kept.digest(before), "windows": kept.digest([windows])}
        with asking_anew(model), choices.parametrised(model, layers) as trained:
            parts = (choices.objective, trained, follower)
            training = _Training(language_model, text, options, *parts)
            training.run(checkpoint, request, f"steps of tuning {step + 1}", progress)
            trained.merge()
        if not all(bool(torch.isfinite(layer.weight).all()) for layer in layers):
            raise training.refusal("a weight is no longer finite")
    return training.report()


def _settings(
    language_model: LanguageModel,
    layers: Sequence[Linear],
    options: Tune | Stepwise,
    follower: Follower | None,
) -> dict[str, Any]:
    """What the weights after a training follow from, beside themselves and the windows."""
    followed = {} if follower is None else follower.request
    return (
        followed
        | options.model_dump()
        | {
            "recover": type(options).__name__.lower(),
            "model": language_model.fingerprint,
            "device": layers[0].weight.device.type,
            "torch": str(torch.__version__),
        }
    )


def _text(windows: Tensor, options: Tune | Stepwise, mixture: Mixture | None, seed: str) -> _Text:
    """What a training trains on, if there is enough of it."""
    fault = options.fault_of_text(len(windows), () if mixture is None else mixture.sources)
    if fault:
        raise RecipeError(f"training {fault}")
    return _Text(windows, order_of(options, len(windows), mixture, seed), mixture)


@contextmanager
def _drawing(language_model: LanguageModel, seed: str) -> Iterator[None]:
    """Within it, what torch draws follows from a seed; its generators are as before afterwards."""
    devices = [language_model.device] if language_model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(random.Random(seed).getrandbits(63))
        yield


@contextmanager
def _undone(layers: Sequence[Linear]) -> Iterator[list[Tensor]]:
    """Within it, an error brings back the weights of before, of which it hands on copies."""
    parameters: list[Any] = [layer.module.weight for layer in layers]
    before = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    try:
        yield before
    except BaseException:
        for parameter, weight in zip(parameters, before, strict=True):
            parameter.detach().copy_(weight)
        raise


@dataclass(frozen=True)
class _Text:
    """What a training trains on."""

    windows: Tensor
    order: Equal | ByDegradation
    mixture: Mixture | None

    @property
    def sources(self) -> int:
        """How many it has."""
        return 1 if self.mixture is None else len(self.mixture.names)

    @property
    def request(self) -> dict[str, Any]:
        """What its order follows from beside seed and options, as plain numbers."""
        return {} if self.mixture is None else self.mixture.request


@dataclass
class _Training:
    """A training under way."""

    language_model: LanguageModel
    text: _Text
    options: Tune | Stepwise
    objective: Objective
    trained: Parametrisation
    follower: Follower | None = None
    losses: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    skipped_of: list[int] = field(default_factory=list)
    """of each source, so many of those steps had windows of it"""
    looks: list[tuple[int, float]] = field(default_factory=list)
    best: list[Tensor] = field(default_factory=list)
    """masters at the best look, on the CPU"""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.masters = self.trained.masters
        self.optimizer = OPTIMIZERS[self.options.optimizer](self.masters, 0.0)
        self.windows, self.order = self.text.windows, self.text.order
        self.skipped_of = [0] * self.text.sources

    def run(
        self,
        checkpoint: Path | None,
        request: dict[str, Any],
        what: str,
        progress: Progress | None,
    ) -> None:
        """All steps, from where the checkpoint is."""
        begin = time.perf_counter()
        if self.follower is not None:
            self.follower.follow(self.optimizer, self.order.steps)
        if checkpoint is not None:
            self._take_up(checkpoint, request)
        begin -= self.seconds
        if self.options.patience and not self.looks:
            self._look()
        total = self.order.steps
        while len(self.losses) < total and not self._is_over:
            if self.order.is_measured_before(len(self.losses)):
                self._measure()
            self._step()
            done = len(self.losses)
            if self.follower is not None:
                self.follower.act(self.trained, done, total)
            if self.options.patience and (done % self.options.every == 0 or done == total):
                self._look()
            self.seconds = time.perf_counter() - begin
            is_last = done == total or self._is_over
            if checkpoint is not None and (done % KEEP_EVERY == 0 or is_last):
                kept.write(checkpoint, request, self._state())
            if progress is not None:
                progress(what, done, total)
        self._settle()

    def report(self) -> TrainingReport:
        """What it did."""
        length, options = self.windows.shape[1], self.options
        return TrainingReport(
            tuple(self.losses),
            min(options.drawn, options.batch * len(self.losses)) * length,
            self.seconds,
            tuple(self.skipped),
            tuple(self.looks),
            self.looks[self._best_look][0] if self.looks else None,
            tuple(self._of_sources(length)),
        )

    def _of_sources(self, length: int) -> Iterator[SourceReport]:
        """What it did with each source, of windows of so many tokens."""
        names = () if self.text.mixture is None else self.text.mixture.names
        drawn, order = self.order.drawn_of(len(self.losses)), self.order
        for place, name in enumerate(names):
            curves: list[tuple[tuple[int, float], ...]] = [(), ()]
            if isinstance(order, ByDegradation):
                both = (order.shares, order.growth)
                curves = [tuple((done, one[place]) for done, one in curve) for curve in both]
            yield SourceReport(name, drawn[place] * length, self.skipped_of[place], *curves)

    @property
    def _best_look(self) -> int:
        losses = [loss if math.isfinite(loss) else math.inf for _, loss in self.looks]
        return losses.index(min(losses))

    @property
    def _is_over(self) -> bool:
        """Whether looks have been no better for long enough."""
        patience = self.options.patience
        return bool(self.looks) and len(self.looks) - 1 - self._best_look >= patience

    def _step(self) -> None:
        """One step of the optimizer, or none where its loss or gradient is not finite."""
        place = len(self.losses)
        batch = self.order.batch(place)
        loss, fault = self._add_gradients(batch)
        self.losses.append(loss)
        if not fault:
            gradients = [one.grad for one in self.masters if one.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            if not bool(torch.isfinite(norm)):
                fault = f"the norm of the gradients is {float(norm)}"
        if fault:
            self._skip(fault, batch)
        else:
            if self.follower is not None:
                self.follower.see(self.trained)
            nn.utils.clip_grads_with_norm_(self.masters, HIGHEST_NORM, norm)
            options = self.options
            share = _share_of_rate(place, self.order.steps, options.warm_up)
            for group in self.optimizer.param_groups:
                group["lr"] = options.learning_rate * share
            self.optimizer.step()
        self.optimizer.zero_grad()
        if not fault:
            self.trained.write()
            if not all(bool(torch.isfinite(master).all()) for master in self.masters):
                raise self.refusal("a weight is no longer finite")

    def _add_gradients(self, places: list[int]) -> tuple[float, str]:
        """The mean loss of some windows, and what is wrong with it; fills masters' gradients."""
        total = 0.0
        for place in places:
            ids = self.windows[place].to(self.language_model.device)
            loss = self.objective.loss(self.language_model.model, ids, place)
            found = float(loss.detach())
            if not math.isfinite(found):
                return math.nan, f"the loss is {found}"
            (loss / len(places)).backward()  # type: ignore[no-untyped-call]
            total += found
        return total / len(places), ""

    def _skip(self, fault: str, batch: Sequence[int]) -> None:
        """Note a step that changes nothing, on the windows at some places.

        Raises:
            RecipeError: nor did those before it, or it is the last, so nobody knows what is left.
        """
        done = len(self.losses)
        self.skipped.append(done)
        labels = () if self.text.mixture is None else self.text.mixture.labels
        for source in {labels[place] for place in batch} if labels else ():
            self.skipped_of[source] += 1
        recent = range(done - MOST_SKIPPED + 1, done + 1)
        if done == self.order.steps or all(place in self.skipped for place in recent):
            raise self.refusal(fault)

    def refusal(self, fault: str) -> RecipeError:
        """What is said where training makes no sense any more."""
        where = f"step {len(self.losses)} of {self.order.steps}"
        return RecipeError(
            f"tuning, {where}: {fault}; choose a lower learning_rate or, if no step before went "
            "well, check the model or try --dtype float32 (the weights are again those from before "
            "the tuning)"
        )

    def _measure(self) -> None:
        """Let the order of windows know how the sources do."""
        _, held_out = self.options.split(len(self.windows), self.text.sources)
        with self.trained.measuring():
            losses = losses_of(self.language_model, self.windows, held_out)
        self.order.measured(len(self.losses), losses)

    @torch.no_grad()
    def _look(self) -> None:
        """Note the mean objective on the windows held out, and the masters if it is the best."""
        _, held_out = self.options.split(len(self.windows), self.text.sources)
        with self.trained.measuring():
            losses = [
                float(
                    self.objective.loss(
                        self.language_model.model,
                        self.windows[place].to(self.language_model.device),
                        place,
                    )
                )
                for place in held_out
            ]
        self.looks.append((len(self.losses), sum(losses) / len(losses)))
        if self._best_look == len(self.looks) - 1:
            self.best = [master.detach().to("cpu", copy=True) for master in self.masters]

    def _settle(self) -> None:
        """Bring back the best state, where there were looks, and say which steps were skipped."""
        if self.looks:
            self._load(self.best)
        if self.skipped:
            named = () if self.text.mixture is None else self.text.mixture.names
            pairs = zip(named, self.skipped_of, strict=False)
            told = ", ".join(f"{count} with text of {name}" for name, count in pairs if count)
            warnings.warn(
                f"{len(self.skipped)} of {len(self.losses)} training steps changed nothing, since "
                f"their loss or gradient was not finite; the first was step {self.skipped[0]}"
                + (f" ({told})" if told else ""),
                PruneZeroWarning,
                stacklevel=5,
            )

    def _load(self, masters: Sequence[Tensor]) -> None:
        for master, value in zip(self.masters, masters, strict=True):
            master.detach().copy_(value)
        self.trained.write()

    def _state(self) -> dict[str, Any]:
        device = self.language_model.device
        return {
            "losses": self.losses,
            "skipped": self.skipped,
            "skipped_of": self.skipped_of,
            "order": self.order.state(),
            "looks": self.looks,
            "best": self.best,
            "seconds": self.seconds,
            "masters": [master.detach() for master in self.masters],
            "frozen": self.trained.frozen(),
            "follower": {} if self.follower is None else self.follower.state(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def _take_up(self, path: Path, request: dict[str, Any]) -> None:
        """Bring back a training as it was kept, or keep its beginning."""
        if not path.exists():
            # A place that cannot be written is refused before the work.
            kept.write(path, request, self._state())
        state = kept.read(path, request)
        self._load(state["masters"])
        self.trained.load_frozen(state["frozen"])
        if self.follower is not None:
            self.follower.load(self.trained, state["follower"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.order.load(state["order"])
        self.losses, self.skipped, self.best = state["losses"], state["skipped"], state["best"]
        self.skipped_of = list(state["skipped_of"])
        self.looks = [(done, loss) for done, loss in state["looks"]]
        self.seconds = float(state["seconds"])
        torch.set_rng_state(state["random"])
        if state["random_device"] is not None:
            torch.cuda.set_rng_state(state["random_device"], self.language_model.device)


def _share_of_rate(place: int, steps: int, warm_up: float) -> float:
    """The learning rate of one step, as a fraction of the highest."""
    rising = max(1, math.ceil(warm_up * steps))
    return min((place + 1) / rising, (steps - place) / (steps - rising + 1))
