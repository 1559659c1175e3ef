"""How are calibration inputs carried from block to block, one block at a time?

The model itself is run once to see what it hands to each of its blocks besides the hidden states
(masks, rotary embeddings, ...). Those arguments are handed on as they came, never named or
rebuilt, so a new transformers version or model family needs no change here. Sequences go through
one by one, so no result depends on batching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError, StatisticsError
from prunezero.models.anatomy.linears import Linear, find_blocks
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.expert_calls import fill_up
from prunezero.models.observing.hooks import StopForwardError, empty_statistics, observing, removing
from prunezero.models.text.windows import check_windows
from prunezero.scoring.statistics import SUMS, Statistics

# Sums that need no backward pass.
FORWARD_SUMS = frozenset(name for name, row in SUMS.items() if row.source in ("inputs", "outputs"))
# Arguments may differ by this between sequences, relatively and absolutely: on a busy machine the
# same cosines were seen to differ in their last bits, and bfloat16 has few of them.
_JITTER = 0.01


class BlockWalk:
    """Hidden states of the calibration sequences in front of one block; only those are kept.

    `observe` runs the block and leaves the hidden states where they are, `advance` moves them past
    it. Prune between the two, and later blocks see what the pruned blocks make of the text.

    Only the block at work has to have its weights: the first one to begin with, then each in turn.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        batches: Tensor,
        *,
        states_device: torch.device | None = None,
    ) -> None:
        """Embed the sequences.

        Args:
            language_model: may be pruned block by block during the walk.
            batches: token ids [count, length].
            states_device: where hidden states wait; that of the model if None.

        Raises:
            TextError: the model cannot be run on these ids.
            ModelError: the model does not hand its hidden states from block to block.
        """
        check_windows(batches, language_model)
        self.blocks = find_blocks(language_model.model)
        self.position = 0
        self.scarce: list[str] = []
        """names of experts' matrices so far that saw too few tokens, see `fill_up`"""
        self._device = language_model.device
        self._states_device = states_device or language_model.device
        body = language_model.model.base_model
        first = batches[:1].to(language_model.device)
        self._extras, self._output = record_calls(body, self.blocks, first)
        self._states: list[Tensor] = []
        for ids in batches:
            state, extras = first_block_call(
                body, self.blocks[0], ids[None].to(language_model.device)
            )
            if not _same(extras, self._extras[0], tolerance=_JITTER):
                raise ModelError(
                    f"{type(language_model.model).__name__} hands its blocks arguments that depend "
                    "on the text; this layout is not supported"
                )
            self._states.append(state.to(self._states_device))

    @property
    def states(self) -> tuple[Tensor, ...]:
        """Hidden states in front of the current block, one [1, length, hidden] per sequence."""
        return tuple(self._states)

    def observe(
        self, index: int, layers: Sequence[Linear], sums: Iterable[str]
    ) -> dict[str, Statistics]:
        """Statistics of the layers of block `index`, by layer name; the walk does not move.

        Args:
            index: of the current block.
            layers: those of other blocks are left out.
            sums: names of forward sums, see `FORWARD_SUMS`.

        Raises:
            StatisticsError: the walk is not at this block, a sum needs gradients, an input or
                output is not finite, or a layer saw no tokens.
        """
        return self._run(index, layers, sums, moves=False)

    def advance(self, index: int) -> None:
        """Run block `index` as its weights are now; its outputs are the next block's inputs."""
        self._run(index, [], [], moves=True)

    def observe_and_advance(
        self, index: int, layers: Sequence[Linear], sums: Iterable[str]
    ) -> dict[str, Statistics]:
        """`observe` and `advance` in one forward pass: both see the same weights."""
        return self._run(index, layers, sums, moves=True)

    def carry(self, index: int, step: Callable[..., Tensor], *, moves: bool) -> None:
        """Let `step` stand for block `index`, or for a part of it.

        Args:
            step: called with hidden states [1, length, hidden] and the other arguments of the
                block; what it returns takes their place.
            moves: whether the walk is behind the block then.

        Raises:
            StatisticsError: the walk is not at this block.
        """
        self._refuse_other_place(index)
        rest, named = self._extras[index]
        with torch.no_grad():
            for place, state in enumerate(self._states):
                found = step(state.to(self._device), *rest, **named)
                self._states[place] = found.to(self._states_device)
        self.position += int(moves)

    @contextmanager
    def replaying(self, sequence: int) -> Iterator[None]:
        """Within it, no block runs: what stands behind them gets the walk's states of a sequence.

        So behind the last block the model answers as it would to that sequence, and its blocks need
        no weights. To fewer tokens it answers as to the first ones of the sequence.
        """
        state = self._states[sequence]

        def answer(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return with_hidden(self._output, state[:, : hidden.shape[1]].to(self._device))

        with answering(self.blocks, answer):
            yield

    def _run(
        self, index: int, layers: Sequence[Linear], sums: Iterable[str], *, moves: bool
    ) -> dict[str, Statistics]:
        self._refuse_other_place(index)
        names = _forward_sums(sums)
        here = [layer for layer in layers if layer.block == index]
        collected = {layer.name: empty_statistics(layer, names) for layer in here}
        rest, named = self._extras[index]
        with torch.no_grad(), observing(here, collected, stop_early=not moves) as visits:
            for place, state in enumerate(self._states):
                with suppress(StopForwardError):
                    output = self.blocks[index](state.to(self._device), *rest, **named)
                    if moves:
                        self._states[place] = hidden_of(output).to(self._states_device)
                visits.end_sequence()
        self.position += int(moves)
        if names:
            for statistics in collected.values():
                # One whose tokens all go to other experts counts too.
                statistics.sequences = max(statistics.sequences, len(self._states))
            self.scarce += fill_up(collected, here)
            _check_seen(collected)
        return collected

    def _refuse_other_place(self, index: int) -> None:
        if index != self.position:
            raise StatisticsError(
                f"the walk is in front of block {self.position} but was asked for block {index}; "
                "blocks are visited in order, once each"
            )


def hidden_of(output: Any) -> Tensor:
    """The hidden states [1, length, hidden] in what a block returned.

    Raises:
        ModelError: it returned neither a tensor nor a tuple that starts with one.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0]
    raise ModelError(
        f"a block returned {type(output).__name__} instead of hidden states; "
        "this layout is not supported"
    )


def _forward_sums(sums: Iterable[str]) -> frozenset[str]:
    names = frozenset(sums)
    backward = sorted(name for name in names if name in SUMS and name not in FORWARD_SUMS)
    if backward:
        raise StatisticsError(
            f"{', '.join(backward)} needs gradients of the whole model, which a walk over blocks "
            "does not have; use statistics of the dense model"
        )
    return names


def _check_seen(collected: dict[str, Statistics]) -> None:
    unseen = [name for name, statistics in collected.items() if statistics.tokens == 0]
    if unseen:
        raise StatisticsError(
            f"layer '{unseen[0]}' saw no calibration token ({len(unseen)} such layers in its "
            "block); use more text, or leave the layer out with ignore"
        )


def with_hidden(output: Any, state: Tensor) -> Any:
    """What a block returned, with other hidden states in it."""
    return (state, *output[1:]) if isinstance(output, tuple) else state


def record_calls(
    body: nn.Module, blocks: list[nn.Module], ids: Tensor
) -> tuple[list[tuple[tuple[Any, ...], dict[str, Any]]], Any]:
    """What the model hands each block besides hidden states, and what the first one returns.

    Only the first block computes; the others hand on its output, so their weights are not needed.
    """
    extras: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Any] = []

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state, rest, named = split_call(args, kwargs)
        if outputs and not _same(state, hidden_of(outputs[0])):
            raise ModelError(
                f"{type(body).__name__} changes hidden states between its blocks; "
                "this layout is not supported"
            )
        extras.append((rest, named))

    def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output)

    def answer(*args: Any, **kwargs: Any) -> Any:
        if is_turned and len(extras) == len(blocks):
            # Behind its last block the stream is wider than behind the first.
            raise StopForwardError
        return outputs[0]

    is_turned = bool(getattr(getattr(body, "config", None), "rotated", None))
    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles.append(blocks[0].register_forward_hook(after))
    ending = suppress(StopForwardError)
    with torch.no_grad(), removing(handles), answering(blocks[1:], answer), ending:
        body(ids, use_cache=False)
    if len(extras) != len(blocks):
        raise ModelError(
            f"{type(body).__name__} has {len(blocks)} blocks but ran {len(extras)} of them in one "
            "forward pass; this layout is not supported"
        )
    return extras, outputs[0]


@contextmanager
def answering(blocks: list[nn.Module], answer: Callable[..., Any]) -> Iterator[None]:
    """Within it, the blocks compute nothing and return what `answer` does."""
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = answer
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def first_block_call(
    body: nn.Module, block: nn.Module, ids: Tensor
) -> tuple[Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Hidden states and other arguments of the first block, without running the rest.

    Args:
        body: the model without its head.
        ids: [1, length].
    """
    calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(split_call(args, kwargs))
        raise StopForwardError

    handle = block.register_forward_pre_hook(before, with_kwargs=True)
    with torch.no_grad(), removing([handle]), suppress(StopForwardError):
        body(ids, use_cache=False)
    state, rest, named = calls[0]
    return state, (rest, named)


def split_call(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """A call of a block as its hidden states and the other arguments.

    Raises:
        ModelError: the first argument is no tensor.
    """
    if not args or not isinstance(args[0], Tensor):
        raise ModelError(
            "the model does not hand hidden states to its blocks as the first argument; "
            "this layout is not supported"
        )
    return args[0], args[1:], kwargs


def _same(left: Any, right: Any, *, tolerance: float = 0.0) -> bool:
    """Whether two captured arguments are equal, looking into tuples, lists and dicts."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and _equal(left, right, tolerance)
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        pairs = zip(left, right, strict=False)
        return len(left) == len(right) and all(_same(*one, tolerance=tolerance) for one in pairs)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(
            _same(left[key], right[key], tolerance=tolerance) for key in left
        )
    return type(left) is type(right)


def _equal(left: Tensor, right: Tensor, tolerance: float) -> bool:
    """Whether two tensors hold the same numbers, NaN included: a broken model has its own error."""
    if left is right or not left.is_floating_point():
        return left is right or torch.equal(left, right)
    same_kind = left.shape == right.shape and left.dtype == right.dtype
    return same_kind and torch.allclose(left, right, rtol=tolerance, atol=tolerance, equal_nan=True)
