"""How well does a checkpoint predict text, with one of its blocks in memory at a time?

All windows walk through the blocks together; what the model makes of the last hidden states is then
measured window by window, as that of a loaded model.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import Tensor

from prunezero.models.evaluation import CHUNK, Evaluation, evaluate
from prunezero.models.observing.calibration import BlockWalk, Progress
from prunezero.models.streaming.memory import SPARE_BYTES
from prunezero.models.streaming.streamed_model import StreamedModel


def evaluate_streamed(
    source: str | Path | StreamedModel,
    windows: Tensor,
    *,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> Evaluation:
    """The perplexity that `evaluate` measures of the loaded model, without a distance to another.

    In memory are the hidden states of all windows, on the CPU, and first one block after another,
    then what is outside the blocks with the logits of one window.

    Args:
        source: folder of safetensors, or a `StreamedModel` of it.
        windows: token ids [count, length].
        dtype: of the forward passes, see `StreamedModel`.
        device: where blocks work.
        progress: told (what, done, total) as the work goes on.

    Raises:
        ModelError: the folder cannot be read, or its model not be run block by block.
        TextError: the model cannot be run on these ids.
    """
    begin = time.perf_counter()
    streamed = source
    if not isinstance(streamed, StreamedModel):
        streamed = StreamedModel(streamed, dtype=dtype, device=device)
    walk = _walked(streamed, windows, progress or (lambda what, done, total: None))
    losses: list[float] = []
    with streamed.outside(with_head=True):
        for place, ids in enumerate(windows):
            with walk.replaying(place):
                losses += evaluate(streamed.language_model, ids[None]).window_losses
    perplexity = float(torch.tensor(losses, dtype=torch.float64).mean().exp())
    return Evaluation(
        perplexity=perplexity if math.isfinite(perplexity) else math.nan,
        kl=None,
        tokens=windows.shape[0] * (windows.shape[1] - 1),
        seconds=time.perf_counter() - begin,
        window_losses=tuple(losses),
    )


def evaluation_bytes(streamed: StreamedModel, windows: Tensor) -> int:
    """Estimate of what `evaluate_streamed` holds in memory at the same time, from shapes alone."""
    model = streamed.language_model
    vocabulary, width = model.model.get_input_embeddings().weight.shape
    size = model.dtype.itemsize
    # Logits as they come, and two copies in float32.
    logits = min(windows.shape[1], CHUNK) * vocabulary * (size + 8)
    outside, block = streamed.weight_bytes()
    states = windows.numel() * width * size
    return SPARE_BYTES + states + max(block, outside + max(logits, vocabulary * width * size))


def _walked(streamed: StreamedModel, windows: Tensor, tell: Progress) -> BlockWalk:
    """The windows behind the last block."""
    with streamed.outside(), streamed.block(0):
        walk = BlockWalk(streamed.language_model, windows, states_device=torch.device("cpu"))
    total = len(streamed.blocks)
    for index in range(total):
        with streamed.block(index):
            walk.advance(index)
        tell("blocks walked", index + 1, total)
    return walk
