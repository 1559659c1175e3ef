"""How is some of what pruning cost won back by a little training?

The weights that stay are trained on the next-token loss, and the mask is held: what is exactly zero
before the tuning is exactly zero after every step of it. Between pruning steps of growing sparsity
this is Prune and Tune, Syed et al. 2023 (ICLR Tiny Papers).
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.errors import OutputError, RecipeError, differences, reason
from prunezero.models.anatomy.linears import Linear
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.calibration import Progress
from prunezero.models.observing.gradients import asking_anew, sequence_loss
from prunezero.models.observing.hooks import removing
from prunezero.models.text.windows import check_windows
from prunezero.pruning.recipes.word_options import Options, Tune

# Steps of the optimizer between two checkpoints.
KEEP_EVERY = 10
# The learning rate rises over this share of the steps.
WARM_UP = 0.05
# Gradients of all layers together are scaled down to this norm.
HIGHEST_NORM = 1.0

OPTIMIZERS: dict[str, Callable[[list[Tensor], float], torch.optim.Optimizer]] = {
    # Decay would pull at weights that training is to win back.
    "adamw": lambda weights, rate: torch.optim.AdamW(weights, rate, weight_decay=0.0),
    "adam": lambda weights, rate: torch.optim.Adam(weights, rate),
    "sgd": lambda weights, rate: torch.optim.SGD(weights, rate, momentum=0.9),
}


@dataclass(frozen=True)
class TuneReport:
    """What a tuning did."""

    losses: tuple[float, ...]
    """mean nats per predicted token before each step of the optimizer, on that step's sequences"""
    tokens: int
    """in the sequences that were trained on"""
    seconds: float
    """elapsed, with those before an interruption"""


@dataclass(frozen=True)
class _Trained:
    """One layer in training."""

    parameter: nn.Parameter
    master: Tensor
    """what the optimizer sees: the same storage, or a float32 copy of 16-bit weights"""
    is_removed: Tensor
    """bool of the parameter's shape: exactly zero before the tuning"""
    before: Tensor
    """copy on the CPU of the parameter before the tuning"""

    def add_gradient(self, parameter: Tensor) -> None:
        """Move the gradient of one sequence to the master; removed weights have none."""
        assert parameter.grad is not None  # the hook runs after it was set
        gradient, parameter.grad = parameter.grad.to(self.master.dtype), None
        gradient.masked_fill_(self.is_removed, 0.0)
        self.master.grad = gradient if self.master.grad is None else self.master.grad + gradient

    def write(self) -> None:
        """Bring the master into the model, with the mask."""
        self.master.masked_fill_(self.is_removed, 0.0)
        self.parameter.detach().copy_(self.master)


@dataclass(frozen=True)
class _Tuning:
    """All that a tuning changes."""

    trained: list[_Trained]
    optimizer: torch.optim.Optimizer
    losses: list[float]


def no_training(
    language_model: LanguageModel,
    layers: Sequence[Linear],
    windows: Tensor,
    options: Options,
    **choices: object,
) -> TuneReport:
    """Leave the weights as they are; takes what `tune` takes."""
    return TuneReport((), 0, 0.0)


def tune(
    language_model: LanguageModel,
    layers: Sequence[Linear],
    windows: Tensor,
    options: Tune,
    *,
    seed: int = 0,
    step: int = 0,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> TuneReport:
    """Train the weights of some layers that are not zero, in place; all else is frozen.

    The loss of a sequence is the mean cross-entropy, in nats, of its tokens after the first; a step
    follows the mean loss of `options.batch` sequences, drawn without replacement until all windows
    were used. The learning rate rises linearly over the first 5 % of the steps and then falls
    linearly to 0; gradients are clipped at norm 1. Nothing decays, and 16-bit weights are trained
    as float32 copies.

    Whatever ends it early, Ctrl-C included, brings back the weights from before. With a checkpoint
    the same call then goes on where the file was last written, and on a CPU ends in the same bits
    as without the interruption; a GPU adds up gradients in no fixed order.

    Args:
        language_model: pruned, in evaluation mode.
        windows: token ids [count, length].
        seed: with `step`, decides the order of the sequences.
        step: the pruning step that this tuning follows, from 0.
        checkpoint: file that keeps the state every few steps and at the end; None keeps nothing.
        progress: told (what, steps of the optimizer done, and their total).

    Raises:
        TextError: the model cannot be run on these ids.
        RecipeError: the loss, a gradient or a weight is not finite.
        OutputError: the checkpoint cannot be written or read, or is of another request.
    """
    check_windows(windows, language_model)
    tell = progress or (lambda what, done, total: None)
    batches = _batches(len(windows), options, f"{seed} {step}")
    model = language_model.fingerprint
    settings = options.model_dump() | {"seed": seed, "step": step, "model": model}
    begin = time.perf_counter()
    with torch.enable_grad(), _training(language_model.model, layers, options) as tuning:
        request = _request(settings, windows, tuning) if checkpoint else {}
        if checkpoint is not None:
            begin -= _resume(checkpoint, request, tuning)
        for place in range(len(tuning.losses), len(batches)):
            where = f"step {place + 1} of {len(batches)}"
            tuning.losses.append(_add_gradients(language_model, windows[batches[place]], where))
            _advance(tuning, options.learning_rate * _share_of_rate(place, len(batches)), where)
            if checkpoint and ((place + 1) % KEEP_EVERY == 0 or place + 1 == len(batches)):
                _write(checkpoint, request, tuning, time.perf_counter() - begin)
            tell(f"steps of tuning {step + 1}", place + 1, len(batches))
    seconds = time.perf_counter() - begin
    return TuneReport(tuple(tuning.losses), options.sequences * windows.shape[1], seconds)


def _batches(count: int, options: Tune, seed: str) -> list[list[int]]:
    """Places of the windows of each step: every window comes once before any comes again."""
    rng, size = random.Random(seed), options.batch
    rounds = math.ceil(options.sequences / count)
    order = [place for _ in range(rounds) for place in rng.sample(range(count), count)]
    del order[options.sequences :]
    return [order[at : at + size] for at in range(0, len(order), size)]


def _share_of_rate(place: int, steps: int) -> float:
    """The learning rate of one step, as a fraction of the highest."""
    rising = math.ceil(WARM_UP * steps)
    return min((place + 1) / rising, (steps - place) / (steps - rising + 1))


@contextmanager
def _training(model: nn.Module, layers: Sequence[Linear], options: Tune) -> Iterator[_Tuning]:
    """Within it, a backward pass adds to the masters' gradients; an error undoes all changes."""
    trained = [_trained(layer.module.weight) for layer in layers]
    optimizer = OPTIMIZERS[options.optimizer]([one.master for one in trained], 0.0)
    handles: list[Any] = []
    with asking_anew(model), removing(handles):
        try:
            for one in trained:
                one.parameter.requires_grad_(True)
                register: Any = one.parameter.register_post_accumulate_grad_hook
                handles.append(register(one.add_gradient))
            yield _Tuning(trained, optimizer, [])
        except BaseException:
            for one in trained:
                one.parameter.detach().copy_(one.before)
            raise


def _trained(parameter: Any) -> _Trained:
    weight = parameter.detach()
    master = weight.float() if weight.dtype.itemsize < 4 else weight
    return _Trained(parameter, master, weight == 0, weight.to("cpu", copy=True))


def _add_gradients(language_model: LanguageModel, windows: Tensor, where: str) -> float:
    """The mean loss of the windows; its gradients are added to the masters'."""
    total = 0.0
    for ids in windows.to(language_model.device):
        loss = sequence_loss(language_model.model, ids[None])
        found = float(loss.detach())
        if not math.isfinite(found):
            raise _refusal(where, f"the loss is {found}")
        (loss / len(windows)).backward()  # type: ignore[no-untyped-call]
        total += found
    return total / len(windows)


def _advance(tuning: _Tuning, rate: float, where: str) -> None:
    """One step of the optimizer."""
    norm = nn.utils.clip_grad_norm_([one.master for one in tuning.trained], HIGHEST_NORM)
    if not bool(torch.isfinite(norm)):
        raise _refusal(where, f"the norm of the gradients is {float(norm)}")
    for group in tuning.optimizer.param_groups:
        group["lr"] = rate
    tuning.optimizer.step()
    tuning.optimizer.zero_grad()
    for one in tuning.trained:
        one.write()
        if not bool(torch.isfinite(one.parameter).all()):
            raise _refusal(where, "a weight is no longer finite")


def _refusal(where: str, fault: str) -> RecipeError:
    return RecipeError(
        f"tuning, {where}: {fault}; choose a lower learning_rate or, if this is step 1, check the "
        "model or try --dtype float32 (the weights are again those from before the tuning)"
    )


def _request(settings: dict[str, Any], windows: Tensor, tuning: _Tuning) -> dict[str, Any]:
    """What the weights after a tuning follow from."""
    return settings | {
        "weights": _digest([one.before for one in tuning.trained]),
        "windows": _digest([windows]),
        "device": tuning.trained[0].parameter.device.type,
        "torch": str(torch.__version__),
    }


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.blake2b(repr([tensor.shape for tensor in tensors]).encode(), digest_size=8)
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(path: Path, request: dict[str, Any], tuning: _Tuning, seconds: float) -> None:
    """Keep a tuning as it is now; the file is complete or not there."""
    state = {
        "request": request,
        "losses": tuning.losses,
        "seconds": seconds,
        "masters": [one.master for one in tuning.trained],
        "optimizer": tuning.optimizer.state_dict(),
    }
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, unfinished)
        unfinished.replace(path)
    # torch wraps what a full disk says.
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            unfinished.unlink()
        raise OutputError(f"checkpoint {path} cannot be written ({reason(error, path)})") from error


def _resume(path: Path, request: dict[str, Any], tuning: _Tuning) -> float:
    """Bring back a tuning as it was kept, or keep its beginning; returns its seconds."""
    if not path.exists():
        # A place that cannot be written is refused before the work.
        _write(path, request, tuning, 0.0)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        changed = differences(state["request"], request)
    # Whatever a damaged or foreign file makes a reader do.
    except Exception as error:
        fault = "is damaged, or no checkpoint of a tuning; delete it"
        raise OutputError(f"{path} {fault} ({type(error).__name__})") from error
    if changed:
        raise OutputError(f"{path} is of another tuning ({changed}); repeat it or delete that")
    for one, master in zip(tuning.trained, state["masters"], strict=True):
        one.master.copy_(master)
        one.write()
    tuning.optimizer.load_state_dict(state["optimizer"])
    tuning.losses[:] = state["losses"]
    return float(state["seconds"])
