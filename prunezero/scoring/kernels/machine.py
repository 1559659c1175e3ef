"""Many formulas by one kernel that is compiled once: a small machine with a stack in registers.

A kernel of its own for every formula would be compiled longer than it runs, while a search looks at
most formulas once. Here a formula is data: the steps that differ from element to element become a
program of codes, and all programs of a population run side by side over the same matrices. The
operators are the vocabulary's Triton templates, so the machine computes what a kernel of the
formula's own computes; what looks at more than one element is computed in torch beforehand, once
for all formulas that hold it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import torch

from prunezero.formula.code import Step, split_steps, written_out
from prunezero.formula.criterion import Criterion
from prunezero.formula.vocabulary import OPERATORS, Operator
from prunezero.scoring.kernels.files import import_kernels, kernel_folder
from prunezero.scoring.kernels.launches import KERNEL_OPTIONS, on_device_of

# Values that a program may hold at once; what needs more is left to a kernel of its own. A machine
# of fewer moves fewer at every step, and most programs need no more.
DEPTHS = 4, 8
_BLOCK = 512
_INPUT, _NUMBER = "input", "number"


@dataclass(frozen=True)
class Program:
    """A formula as the machine reads it."""

    before: tuple[Step, ...]
    """what has to be computed first, in torch"""
    words: tuple[tuple[str, str], ...]
    """in order: (`input`, its name), (`number`, its text), or (an operator, nothing)"""
    depth: int
    """values that it holds at once"""


@lru_cache(maxsize=4096)
def program(criterion: Criterion) -> Program:
    """The program of a criterion; operands come before their operators, the left one first."""
    split = split_steps(criterion)
    inside = {step.name: step for step in split.inside}
    known = {*criterion.features, *(step.name for step in split.before)}
    words: list[tuple[str, str]] = []

    def write(name: str) -> None:
        if name in inside:
            for argument in inside[name].arguments:
                write(argument)
            words.append((inside[name].operator.name, ""))
        else:
            words.append((_INPUT if name in known else _NUMBER, name))

    every = (*split.before, *split.inside)
    write(every[-1].name if every else criterion.text)
    rises = [1 if kind in (_INPUT, _NUMBER) else 1 - OPERATORS[kind].arity for kind, _ in words]
    return Program(split.before, tuple(words), max(accumulate(rises)))


def can_run(criterion: Criterion) -> bool:
    """Whether the machine can hold the formula."""
    return program(criterion).depth <= DEPTHS[-1]


def scores_of(
    criteria: Sequence[Criterion], features: Mapping[str, torch.Tensor], shape: Sequence[int]
) -> torch.Tensor:
    """The scores of some formulas on a stack of layers, float32 [formulas, layers, out, in].

    Args:
        criteria: each one that `can_run`.
        features: float32, broadcastable to `shape`, on one CUDA device.
        shape: [layers, out, in], of fewer than 2**31 weights.
    """
    device = next(iter(features.values())).device
    words = _vocabulary()
    tape = _Tape(features, {word: code for code, word in enumerate((_INPUT, _NUMBER, *words))})
    for criterion in criteria:
        tape.write(program(criterion))
    deepest = max(program(criterion).depth for criterion in criteria)
    depth = next(one for one in DEPTHS if deepest <= one)
    kernels = import_kernels(machine_source(words, depth), kernel_folder())
    scores = torch.empty(len(criteria), *shape, dtype=torch.float32, device=device)
    size = scores[0].numel()
    inputs = [value.expand(*shape) for value in tape.values]
    with on_device_of(scores):
        kernels.machine_kernel[(-(-size // _BLOCK), len(criteria))](
            scores,
            *(torch.tensor(row, dtype=torch.int32, device=device) for row in tape.rows),
            torch.tensor(tape.numbers or [0.0], dtype=torch.float32, device=device),
            torch.tensor([one.data_ptr() for one in inputs], dtype=torch.int64, device=device),
            torch.tensor([one.stride() for one in inputs], dtype=torch.int64, device=device),
            shape[1],
            shape[2],
            size,
            BLOCK=_BLOCK,
            num_warps=4,
            **KERNEL_OPTIONS,
        )
    return scores


def _vocabulary() -> tuple[str, ...]:
    """All operators that a kernel can compute, ours first."""
    rows = (*OPERATORS.own.values(), *OPERATORS.others().values())
    return tuple(row.name for row in rows if isinstance(row, Operator) and row.triton)


@dataclass
class _Tape:
    """The programs of a population one behind the other, with all that they read."""

    features: Mapping[str, torch.Tensor]
    code_of: Mapping[str, int]
    starts: list[int] = field(default_factory=lambda: [0])
    codes: list[int] = field(default_factory=list)
    which: list[int] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    """the inputs, in the order of their numbers"""
    places: dict[str, int] = field(default_factory=dict)
    """the number of each input, by what it means"""
    computed: dict[str, torch.Tensor] = field(default_factory=dict)
    """what was computed beforehand, by what it means"""

    @property
    def rows(self) -> tuple[list[int], list[int], list[int]]:
        """Where programs start, their codes, and which input or number a code means."""
        return self.starts, self.codes, self.which

    def write(self, one: Program) -> None:
        """Put a program behind the others."""
        # Names of steps are those of one formula; what they stand for is the same in all.
        means = written_out(one.before)
        for step in one.before:
            self._compute(step, means)
        for kind, name in one.words:
            self.codes.append(self.code_of[kind])
            self.which.append(self._place(kind, means.get(name, name)))
        self.starts.append(len(self.codes))

    def _compute(self, step: Step, means: Mapping[str, str]) -> None:
        meaning = means[step.name]
        if meaning in self.computed:
            return
        scope: dict[str, object] = {
            name: self._value(means.get(name, name)) for name in step.arguments if _is_name(name)
        }
        text = (step.operator.torch or "").format(*step.arguments)
        with torch.no_grad():
            self.computed[meaning] = eval(text, {"torch": torch}, scope)

    def _value(self, meaning: str) -> torch.Tensor:
        found = self.computed.get(meaning)
        return self.features[meaning] if found is None else found

    def _place(self, kind: str, meaning: str) -> int:
        if kind == _NUMBER:
            self.numbers.append(float(meaning))
            return len(self.numbers) - 1
        if kind != _INPUT:
            return 0
        if meaning not in self.places:
            self.places[meaning] = len(self.values)
            self.values.append(self._value(meaning))
        return self.places[meaning]


def _is_name(argument: str) -> bool:
    return argument.isidentifier()


@lru_cache(maxsize=16)
def machine_source(words: tuple[str, ...], depth: int) -> str:
    """The machine's kernel for some operators, in the order of their codes."""
    by_arity: dict[int, list[str]] = {1: [], 2: []}
    for code, word in enumerate(words, start=2):
        row = OPERATORS[word]
        value = (row.triton or "").format(*("x", "y")[: row.arity])
        by_arity[row.arity].append(f"if code == {code}:\n                value = {value}")
    binary = [code for code, word in enumerate(words, start=2) if OPERATORS[word].arity == 2]
    deeper = "; ".join(f"s{place} = s{place - 1}" for place in range(depth - 1, 0, -1))
    higher = "; ".join(f"s{place} = s{place + 1}" for place in range(1, depth - 1))
    # Names of one value would be one variable to the compiler, even where they part in the loop.
    zeros = [f"s{place} = tl.zeros([BLOCK], dtype=tl.float32)" for place in range(depth)]
    return (
        _TEMPLATE.replace("$ZEROS", "\n    ".join(zeros))
        .replace("$IS_BINARY", " | ".join(f"(code == {code})" for code in binary))
        .replace("$BINARY", "\n            ".join(by_arity[2]))
        .replace("$UNARY", "\n            ".join(by_arity[1]))
        .replace("$DEEPER", deeper)
        .replace("$HIGHER", higher)
    )


_TEMPLATE = '''"""Generated by prunezero from its vocabulary; changes are overwritten."""

import triton
import triton.language as tl


@triton.jit
def machine_kernel(
    scores, starts, codes, which, numbers, addresses, strides, height, width, size,
    BLOCK: tl.constexpr,
):
    formula = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    column = (place % width).to(tl.int64)
    row = ((place // width) % height).to(tl.int64)
    layer = (place // width // height).to(tl.int64)
    zero = tl.zeros([BLOCK], dtype=tl.float32)
    $ZEROS
    for step in range(tl.load(starts + formula), tl.load(starts + formula + 1)):
        code = tl.load(codes + step)
        index = tl.load(which + step)
        value = zero
        if code < 2:
            if code == 0:
                at = tl.load(addresses + index).to(tl.pointer_type(tl.float32))
                at += layer * tl.load(strides + 3 * index)
                at += row * tl.load(strides + 3 * index + 1)
                value = tl.load(
                    at + column * tl.load(strides + 3 * index + 2), mask=inside, other=0.0
                )
            else:
                value = zero + tl.load(numbers + index)
            $DEEPER
        elif $IS_BINARY:
            x = s1
            y = s0
            $BINARY
            $HIGHER
        else:
            x = s0
            $UNARY
        s0 = value
    tl.store(scores + formula * size + place, s0, mask=inside)
'''
