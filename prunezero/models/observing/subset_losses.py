"""What does the output of a mixture lose where its router may choose among some experts alone?

Of a token let `y_e` be what expert `e` makes of it, `w_e` the weight that the router gives it with
all experts and `v_e` that with some of them, zero where it is not chosen. Then

    || sum_e (v_e - w_e) y_e + r ||^2 = d' G d + 2 c' d + r' r,   d = v - w,

with `G` the products of the token's outputs, one with another, `r` by how much the output with all
experts differs from that wanted (nothing, where that is what is wanted), and `c_e = y_e' r`. So the
experts run once, and a subset costs a call of the router and a few numbers for each token, however
wide the stream is. Subsets are taken several at once, which moves a loss by rounding alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunezero.models.anatomy.experts import MoeLayer
from prunezero.models.anatomy.groups import Group
from prunezero.models.editing.routing import narrowed
from prunezero.models.loading.language_model import LanguageModel

# Numbers of weights that are held at once for several subsets.
_AT_ONCE = 2**22


def mixture_of(group: Group) -> MoeLayer:
    """The router and experts of a group."""
    assert group.mixture is not None  # groups of experts have one; for the type checker
    return group.mixture


def expert_outputs(layer: MoeLayer, tokens: Tensor, expert: int) -> Tensor:
    """What one expert makes of tokens [tokens, hidden], by the code of its own model."""
    indices = torch.full((len(tokens), 1), expert, device=tokens.device)
    with torch.no_grad():
        found: Tensor = layer.experts(tokens, indices, tokens.new_ones(len(tokens), 1))
    return found


@dataclass
class SubsetLosses:
    """Products of the outputs of a mixture's experts, so that any subset is a quadratic form."""

    language_model: LanguageModel
    group: Group
    tokens: Tensor
    """hidden states of all sequences [tokens, hidden]"""
    lengths: list[int]
    """tokens of each sequence"""
    weights: Tensor
    """of the router with all experts, float64 [tokens, experts], zero where one is not chosen"""
    products: Tensor
    """of the experts' outputs one with another, float64 [tokens, experts, experts]"""
    outputs: list[Tensor]
    """of the mixture with all experts, float64 [tokens, hidden] of each sequence"""
    lean: Tensor
    """twice the products of the experts' outputs with the residual, float64 [tokens, experts]"""
    rest: Tensor
    """squares of the residual, float64 [tokens]"""

    @classmethod
    def of(
        cls,
        language_model: LanguageModel,
        group: Group,
        tokens: Sequence[Tensor],
        wanted: Sequence[Tensor] | None = None,
    ) -> SubsetLosses:
        """The losses of a mixture on sequences of tokens.

        Args:
            tokens: hidden states [tokens, hidden] of each sequence.
            wanted: outputs that losses are counted from, float64 [tokens, hidden] of each sequence;
                those with all experts on these tokens, if left out.
        """
        together = torch.cat(list(tokens))
        everyone = torch.ones(group.units, dtype=torch.bool)
        weights = _weights(language_model, group, everyone, together)
        parts, outputs, begin = [], list[Tensor](), 0
        for at, one in enumerate(tokens):
            own = weights[begin : begin + len(one)]
            every = _every_output(mixture_of(group), one)
            outputs.append((own[:, None] @ every)[:, 0])
            parts.append(_products(every, outputs[at], None if wanted is None else wanted[at]))
            begin += len(one)
        products, lean, rest = (torch.cat(part) for part in zip(*parts, strict=True))
        lengths = [len(one) for one in tokens]
        return cls(language_model, group, together, lengths, weights, products, outputs, lean, rest)

    def squares(self, subsets: Tensor) -> Tensor:
        """The squared changes of the output, float64 [subsets, sequences].

        Args:
            subsets: bool [subsets, experts], True = may be chosen.
        """
        step = max(1, _AT_ONCE // self.weights.numel())
        return torch.cat([self._squares(part) for part in torch.split(subsets, step)])

    def losses(self, subsets: Tensor) -> Tensor:
        """The Frobenius norms of the changes, summed over sequences, float64 [subsets].

        Args:
            subsets: bool [subsets, experts], True = may be chosen.
        """
        return self.squares(subsets).sqrt().sum(1)

    def _squares(self, subsets: Tensor) -> Tensor:
        known = self.language_model, self.group
        weights = [_weights(*known, kept, self.tokens) for kept in subsets]
        change = torch.stack(weights, dim=1) - self.weights[:, None]
        found = ((change @ self.products + self.lean[:, None]) * change).sum(-1)
        # Rounding may take what is nearly nothing below zero.
        found = (found + self.rest[:, None]).clamp(min=0.0)
        return torch.stack([one.sum(0) for one in torch.split(found, self.lengths)], dim=1)


def _weights(language_model: LanguageModel, group: Group, kept: Tensor, tokens: Tensor) -> Tensor:
    """The router's weights, float64 [tokens, experts], where it may choose some; else zeros."""
    with torch.no_grad(), narrowed(language_model, group, kept):
        _, weights, indices = mixture_of(group).router(tokens)
    nothing = torch.zeros(len(tokens), group.units, dtype=torch.float64, device=tokens.device)
    return nothing.scatter_(1, indices, weights.double())


def _every_output(layer: MoeLayer, tokens: Tensor) -> Tensor:
    """What each expert makes of tokens, float64 [tokens, experts, hidden]."""
    found = [expert_outputs(layer, tokens, at).double() for at in range(layer.count)]
    return torch.stack(found, dim=1)


def _products(
    every: Tensor, output: Tensor, wanted: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`products`, `lean` and `rest` of one sequence.

    Args:
        every: what each expert makes of it, [tokens, experts, hidden].
        output: of the mixture with all experts, [tokens, hidden].
        wanted: the same as it should be; as it is, if left out.
    """
    residual = torch.zeros_like(output) if wanted is None else output - wanted
    lean = 2 * (every @ residual[..., None])[..., 0]
    return every @ every.transpose(1, 2), lean, residual.square().sum(1)
