"""Where does a router send tokens, and what do its experts make of them?

The model runs as it is, one sequence after another; a hook on the experts of each mixture sees
hidden states, chosen experts and their weights, and the layer's own code is asked once more for the
outputs of single experts. What tokens would lose without an expert is seen by a router that may not
choose it. Sums are of float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.errors import StatisticsError
from prunezero.models.anatomy.experts import MoeLayer
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import find_blocks
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.gradients import sequence_loss
from prunezero.models.observing.hooks import removing
from prunezero.models.observing.subset_losses import SubsetLosses, expert_outputs, mixture_of
from prunezero.models.observing.walk import hidden_of, split_call
from prunezero.models.text.windows import check_windows
from prunezero.scoring.statistics import ROUTING_SUMS, Statistics, routing_contribution

# The sum that needs a backward pass, and that which needs all experts for all tokens.
GRADIENTS = "mask_gradients"
# Weights that are one share of their scores, whichever expert, differ by no more: bfloat16 rounds.
_EVEN = 0.03
# Tokens on which it is tried whether they are.
_TRIED = 16


@dataclass
class Seen:
    """What one mixture did with the tokens of one sequence."""

    tokens: Tensor
    """hidden states [tokens, hidden] that the experts got"""
    indices: Tensor
    """experts chosen [tokens, k]"""
    weights: Tensor
    """of the router for each of them [tokens, k]"""
    logits: Tensor
    """of the router [tokens, experts]"""
    turned: Tensor | None = None
    """1 - cosine of the stream with and without routed experts [tokens], float64"""
    pull: Tensor | None = None
    """gradient of the sequence's loss at the experts' output [tokens, hidden]"""


def routing_statistics(
    language_model: LanguageModel,
    groups: Sequence[Group],
    windows: Tensor,
    sums: Iterable[str],
    *,
    gone: Sequence[Group] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Statistics]:
    """What routers and experts do to sequences, by the names of their groups.

    Args:
        language_model: as it is, within an edit or not; its weights are the same afterwards.
        groups: the mixtures.
        windows: calibration token ids [count, length].
        sums: names in `ROUTING_SUMS`, or mask_gradients.
        gone: no experts, which have edits for that.
        progress: told (what, done, total) as the work goes on.

    Raises:
        TextError: the model cannot be run on these ids.
        StatisticsError: a number is not finite.
    """
    check_windows(windows, language_model)
    names = frozenset(sums)
    letters = {letter for name in names - {GRADIENTS} for letter in ROUTING_SUMS[name].letters}
    found = {group.name: _empty(group, names) for group in groups}
    for done, ids in enumerate(windows, start=1):
        ids = ids[None].to(language_model.device)
        seen = _sequence(language_model, groups, ids, names, turns="t" in letters)
        for group in groups:
            tables = tables_of(language_model, group, seen[group.name], letters, names)
            added = routing_contribution(
                tables, names, len(seen[group.name].tokens), layer=group.name
            )
            found[group.name].add(added)
        if progress is not None:
            progress("sequences seen by experts", done, len(windows))
    return found


def _empty(group: Group, names: Iterable[str]) -> Statistics:
    layer = mixture_of(group)
    return Statistics.empty(names, layer.down.shape[1], layer.count, group.device)


def _sequence(
    language_model: LanguageModel,
    groups: Sequence[Group],
    ids: Tensor,
    names: frozenset[str],
    *,
    turns: bool,
) -> dict[str, Seen]:
    """What the mixtures did with one sequence, by the names of their groups."""
    needs_gradients = GRADIENTS in names
    with watching(language_model.model, groups, turns=turns, pulls=needs_gradients) as found:
        if not needs_gradients:
            with torch.no_grad():
                language_model.model.base_model(ids, use_cache=False)
            return found
        with torch.enable_grad():
            loss = sequence_loss(language_model.model, ids)
            if not bool(torch.isfinite(loss)):
                raise StatisticsError(
                    f"the loss of '{language_model.name}' on a calibration sequence is "
                    f"{float(loss.detach())}; try --dtype float32, or check that the model is sound"
                )
            loss.backward()  # type: ignore[no-untyped-call]
    for one in found.values():
        assert one.pull is not None  # the loss depends on each; for the type checker
        one.pull = one.pull.grad
    return found


@contextmanager
def watching(
    model: Any, groups: Sequence[Group], *, turns: bool = False, pulls: bool = False
) -> Iterator[dict[str, Seen]]:
    """Within it, what mixtures do with a sequence is noted by the names of their groups.

    Args:
        turns: whether the stream without routed experts is computed as well, a second pass of the
            block.
        pulls: whether a backward pass is to leave the gradient at the experts' output in the grad
            of `Seen.pull`.
    """
    found: dict[str, Seen] = {}
    with ExitStack() as hooks:
        for group in groups:
            watch = _Watch(mixture_of(group), group.name, found, pulls=pulls)
            handles = [
                watch.layer.router.register_forward_hook(watch.chose),
                watch.layer.experts.register_forward_hook(watch.computed, with_kwargs=True),
            ]
            if turns:
                block = find_blocks(model)[group.block]
                handles.append(block.register_forward_hook(watch.behind, with_kwargs=True))
            hooks.enter_context(removing(handles))
        yield found


@dataclass
class _Watch:
    """Hooks on one mixture."""

    layer: MoeLayer
    name: str
    found: dict[str, Seen]
    pulls: bool
    is_off: bool = field(default=False, init=False)
    """whether its experts add nothing, and nothing is noted"""
    logits: Tensor | None = field(default=None, init=False)

    def chose(self, router: nn.Module, args: tuple[Any, ...], answer: Any) -> None:
        """Note the router's logits."""
        self.logits = answer[0].detach()

    def computed(
        self, experts: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Note what the experts got."""
        if self.is_off:
            return torch.zeros_like(output)
        tokens, indices, weights = [*args, *named.values()]
        assert self.logits is not None  # routers run before experts; for the type checker
        seen = Seen(tokens.detach(), indices, weights.detach(), self.logits)
        self.found[self.name] = seen
        if not self.pulls:
            return None
        # A gradient at nothing that was added is one at the output.
        seen.pull = torch.zeros_like(output, requires_grad=True)
        return output + seen.pull

    def behind(
        self, block: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        """Compare the stream behind the block with that without the routed experts."""
        if self.is_off:
            return
        state, rest, named = split_call(args, named)
        self.is_off = True
        try:
            with torch.no_grad():
                without = hidden_of(block.forward(state, *rest, **named))[0].double()
        finally:
            self.is_off = False
        behind = hidden_of(output).detach()[0].double()
        self.found[self.name].turned = 1 - torch.cosine_similarity(without, behind)


def tables_of(
    language_model: LanguageModel,
    group: Group,
    seen: Seen,
    letters: Iterable[str],
    names: Iterable[str],
) -> dict[str, Tensor]:
    """What the sums of a mixture are made from, by letter, float64; see `ROUTING_SUMS`."""
    layer, wanted = mixture_of(group), set(letters)
    shape = (len(seen.tokens), layer.count)
    chosen = torch.zeros(shape, dtype=torch.float64, device=seen.tokens.device)
    tables = {
        "r": chosen.scatter(1, seen.indices, 1.0),
        "g": chosen.scatter(1, seen.indices, seen.weights.double()),
    }
    if "s" in wanted:
        tables["s"] = _soft(seen, group)
    if wanted & {"n", "f"} or GRADIENTS in names:
        tables |= _by_expert(layer, seen, tables["r"])
    if "a" in wanted:
        tables["a"] = _largest_activations(layer, seen, tables["r"])
    if seen.turned is not None:
        tables["t"] = seen.turned
    if "w" in wanted:
        tables["w"] = _losses_without(language_model, group, seen)
    if seen.pull is not None:
        tables["e"] = tables["p"] * tables["g"]
    return tables


def _soft(seen: Seen, group: Group) -> Tensor:
    """What the router scores all experts by [tokens, experts]: softmax, or sigmoid where it is.

    Raises:
        StatisticsError: the weights of those chosen are parts of neither, or some were left out.
    """
    logits = seen.logits.double()
    if logits.shape[1] == group.units:
        for scores in (torch.softmax(logits, dim=-1), torch.sigmoid(logits)):
            shares = seen.weights.double() / scores.gather(1, seen.indices)
            if bool(((shares / shares[:, :1] - 1).abs() < _EVEN).all()):
                return scores
    raise StatisticsError(
        f"the weights of the router of {group.name} are parts of neither the softmax nor the "
        "sigmoid of its logits, so there is no soft count (SOFT); use GATE"
    )


def _by_expert(layer: MoeLayer, seen: Seen, routed: Tensor) -> dict[str, Tensor]:
    """Norms of outputs [tokens, experts], their sums [experts, hidden], and pulls on them."""
    norms, pulls = torch.zeros_like(routed), torch.zeros_like(routed)
    totals = routed.new_zeros(layer.count, layer.down.shape[1])
    for expert in range(layer.count):
        places = routed[:, expert].nonzero().flatten()
        if not len(places):
            continue
        outputs = expert_outputs(layer, seen.tokens[places], expert).double()
        norms[places, expert] = outputs.norm(dim=1)
        totals[expert] = outputs.sum(0)
        if seen.pull is not None:
            pulls[places, expert] = (outputs * seen.pull[places].double()).sum(1)
    return {"n": norms, "f": totals, "p": pulls}


def _largest_activations(layer: MoeLayer, seen: Seen, routed: Tensor) -> Tensor:
    """The largest magnitude [experts] of what the second matrix of each expert reads."""
    largest = routed.new_zeros(layer.count)
    for expert in range(layer.count):
        tokens = seen.tokens[routed[:, expert] > 0]
        if len(tokens):
            largest[expert] = _gated(layer.experts, tokens @ layer.up[expert].T).abs().max()
    return largest


def _gated(experts: Any, values: Tensor) -> Tensor:
    """What gates make of values [tokens, 2 * intermediate], by the family's own rule if it has one.

    Returns [tokens, intermediate].
    """
    own = getattr(experts, "_apply_gate", None)
    if own is not None:
        found: Tensor = own(values)
        return found
    gate, up = values.chunk(2, dim=-1)
    product: Tensor = experts.act_fn(gate) * up
    return product


def _losses_without(language_model: LanguageModel, group: Group, seen: Seen) -> Tensor:
    """The norms [experts] by which the output of all tokens changes where one expert is gone."""
    _refuse_without_loss(group)
    losses = SubsetLosses.of(language_model, group, [seen.tokens])
    return losses.losses(~torch.eye(group.units, dtype=torch.bool))


def _refuse_without_loss(group: Group) -> None:
    """Refuse to say what is lost without one expert where none can go by itself.

    Raises:
        StatisticsError: several go at once, or none may.
    """
    if group.strata > 1 or group.units <= group.least:
        raise StatisticsError(
            f"no expert of {group.name} can go by itself, so the loss without one (LOO) is not "
            "known; use another formula"
        )


def unknown_features(groups: Sequence[Group]) -> dict[str, str]:
    """Features of experts that are not known of some of these groups, and why; tried on noise."""
    found: dict[str, str] = {}
    for group in groups:
        for name, refuse in (("LOO", _refuse_without_loss), ("SOFT", _refuse_without_scores)):
            try:
                refuse(group)
            except StatisticsError as error:
                found.setdefault(name, str(error))
    return found


def _refuse_without_scores(group: Group) -> None:
    """Refuse to say what a router scores all experts by, where a few tokens show that it cannot.

    Raises:
        StatisticsError: as `_soft`.
    """
    router, weight = mixture_of(group).router, mixture_of(group).router_weight
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(_TRIED, weight.shape[1], generator=generator).to(weight)
    with torch.no_grad():
        logits, weights, indices = router(tokens)
    _soft(Seen(tokens, indices, weights, logits), group)
