"""reap: remove experts of a language model by the criterion `GF/N`.

Experts of the lowest score leave their stacks and their router. Usage:

    python PAGE.py MODEL_FOLDER TEXT_FILE --sparsity 0.25 --output PRUNED_FOLDER
"""

import argparse
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.report.export.expert_choice import Mixture, check, choose, total
from prunezero.report.export.expert_words import (
    GUARD,
    LETTERS,
    MEASURE,
    PROTECT_FIRST,
    PROTECT_LAST,
    SEED,
)
from prunezero.report.export.page_parts import (
    RefusalError,
    block_list,
    check_text,
    holds_stacks,
    keep_settings,
    windows,
)

# Under these names modules, and configurations, keep how many experts there are.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Watch:
    """Hooks on one mixture, which keep what it does with a sequence."""

    def __init__(self, mixture: Any, block: Any) -> None:
        """Watch until it is removed."""
        self.mixture, self.is_off = mixture, False
        self.logits: Any = None
        self.tokens: Any = None
        self.weights: Any = None
        self.indices: Any = None
        self.turned: Any = None
        self.pull: Any = None
        self.hooks = [
            mixture.router.register_forward_hook(self.chose),
            mixture.experts.register_forward_hook(self.computed, with_kwargs=True),
        ]
        if "t" in LETTERS:
            self.hooks.append(block.register_forward_hook(self.behind, with_kwargs=True))

    def chose(self, module: Any, args: Any, answer: Any) -> None:
        """Keep the router's logits."""
        self.logits = answer[0].detach()

    def computed(self, module: Any, args: Any, named: Any, output: Tensor) -> Any:
        """Keep hidden states, chosen experts and their weights."""
        if self.is_off:
            return torch.zeros_like(output)
        given = [*args, *named.values()]
        self.tokens, self.indices, self.weights = (one.detach() for one in given)
        if "e" in LETTERS:
            # A gradient at nothing that was added is one at the output.
            self.pull = torch.zeros_like(output, requires_grad=True)
            return output + self.pull
        return None

    def behind(self, block: Any, args: Any, named: Any, output: Any) -> None:
        """Compare the stream behind the block with that without the routed experts."""
        if self.is_off:
            return
        self.is_off = True
        try:
            with torch.no_grad():
                without = block.forward(*args, **named)
        finally:
            self.is_off = False
        both = [one[0] if isinstance(one, tuple) else one for one in (without, output)]
        pair = [one.detach()[0].double() for one in both]
        self.turned = 1 - torch.cosine_similarity(*pair)

    def remove(self) -> None:
        """Watch no longer."""
        for hook in self.hooks:
            hook.remove()


def score(mixture: Mixture, seen: dict[str, Any]) -> Tensor:
    """How much each expert matters, float32 [experts]; the lowest go first."""
    GF = (seen["gated_norm_sum"] / seen["tokens"])[:, None].float()
    N = (seen["routed_count"] / seen["tokens"])[:, None].float()
    score = torch.where(N == 0, 0.0, GF / N)
    return score.expand(mixture.units, 1)[:, 0]


def sums_of(tables: dict[str, Tensor]) -> dict[str, Tensor]:
    """What one sequence adds to the sums that the formula reads, by name."""
    r, g, n = tables["r"], tables["g"], tables["n"]
    return {"routed_count": r.sum(0), "gated_norm_sum": (g * n).sum(0)}


def prune_(model: Any, batches: Any, sparsity: float) -> dict[str, Any]:
    """Take experts out of a model in place, and tell which stay.

    `batches` are sequences of token ids, int64 [1, length] each; `sparsity` is the share of what
    all experts cost that goes, rounded down. Nothing is changed where a RefusalError is raised.
    """
    if not 0 <= sparsity < 1:
        raise RefusalError(f"sparsity must be at least 0 and below 1 but got {sparsity}")
    mixtures = find_mixtures(model.eval())
    check(mixtures, sparsity)
    if LETTERS:
        stats = measure(model, mixtures, list(batches))
    else:
        stats = {one.name: {} for one in mixtures}
    with torch.no_grad():
        scores = [usable_scores(one, stats) for one in mixtures]
        kept = choose(mixtures, scores, sparsity)
        remove(model, mixtures, kept)
    pairs = list(zip(mixtures, kept, strict=True))
    gone = sum(one.cost[MEASURE] * int((~stays).sum()) for one, stays in pairs)
    return {"sparsity": gone / total(mixtures), "kept": {one.name: stays for one, stays in pairs}}


def find_mixtures(model: Any) -> list[Mixture]:
    """The mixtures of a model, in the order of its blocks."""
    prefix, blocks = block_list(model)
    found = []
    for index, block in enumerate(blocks):
        ends = index < PROTECT_FIRST or index >= len(blocks) - PROTECT_LAST
        for path, module in list(block.named_modules()):
            name = f"{prefix}.{index}.{path}"
            if holds_stacks(name, path, module):
                outer = name.rpartition(".")[0]
                parent = model.get_submodule(outer)
                found.append(mixture_of(outer, index, parent, module, ends))
    if not found:
        raise RefusalError(f"{type(model).__name__} has no mixture of experts")
    return found


def mixture_of(name: str, block: int, module: Any, experts: Any, is_protected: bool) -> Mixture:
    """The mixture of a module that holds experts, once it is sure what its router answers."""
    count = len(experts.down_proj)
    routers = [one for one in module.children() if one is not experts and chooses_from(one, count)]
    if len(routers) != 1:
        raise RefusalError(f"{name} has {len(routers)} routers instead of one")
    (router,) = routers
    for key, value in router_tensors(router):
        if key != "weight" and list(value.shape).count(count) != 1:
            raise RefusalError(f"the router of {name} holds {key} {list(value.shape)}, whose?")
    refuse_other_answers(name, router, count)
    groups = [getattr(router, word, None) for word in ("num_group", "n_group")]
    strata = max([1, *(one for one in groups if isinstance(one, int))])
    strata = 1 if getattr(router, "topk_method", "") == "greedy" else strata
    # A group is judged by its best two.
    each = max(2, -(-router.top_k // int(getattr(router, "topk_group", strata))))
    learned = [experts.gate_up_proj, experts.down_proj, *router.parameters()]
    cost = {"units": 1.0, "parameters": float(sum(one.numel() // count for one in learned))}
    least = router.top_k if strata == 1 else strata * each
    return Mixture(name, block, module, router, experts, count, strata, least, cost, is_protected)


def chooses_from(module: Any, count: int) -> bool:
    """Whether a module chooses from so many experts."""
    weight = getattr(module, "weight", None)
    rows = isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) == count
    return rows and isinstance(getattr(module, "top_k", None), int)


def router_tensors(router: Any) -> list[tuple[str, Tensor]]:
    """What a router holds of its experts, learned or not."""
    every = [*router.named_parameters(), *router.named_buffers()]
    return [(name, value) for name, value in every if value.dim()]


def refuse_other_answers(name: str, router: Any, count: int) -> None:
    """Refuse a router that does not answer with logits, weights and indices of those chosen."""
    tried = torch.randn(3, router.weight.shape[1], generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            logits, weights, indices = router(tried.to(router.weight))
        shapes = [tuple(one.shape) for one in (logits, weights, indices)]
    # Whatever a module says that is called in another way.
    except Exception:
        shapes = []
    if shapes != [(3, count), (3, router.top_k), (3, router.top_k)]:
        raise RefusalError(f"the router of {name} does not answer with logits, weights and indices")


def measure(model: Any, mixtures: list[Mixture], batches: list[Tensor]) -> dict[str, Any]:
    """The sums of each mixture over the text of the dense model, by its name."""
    check_text(model, batches)
    stats: dict[str, Any] = {one.name: {"tokens": 0, "sequences": 0} for one in mixtures}
    before = [(one, one.requires_grad) for one in model.parameters()]
    model.requires_grad_(False)
    blocks = block_list(model)[1]
    try:
        for ids in batches:
            watches = [Watch(one, blocks[one.block]) for one in mixtures]
            try:
                read(model, ids.to(before[0][0].device))
            finally:
                for watch in watches:
                    watch.remove()
            for watch in watches:
                add_up(watch, stats[watch.mixture.name])
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
    return stats


def read(model: Any, ids: Tensor) -> None:
    """Run one sequence of token ids [1, length] through the dense model."""
    if "e" in LETTERS:
        with torch.enable_grad():
            logits = model(ids, use_cache=False).logits[0, :-1].float()
            loss = nn.functional.cross_entropy(logits, ids[0, 1:])
            if not torch.isfinite(loss):
                raise RefusalError(f"the loss of a sequence is {float(loss.detach())}")
            loss.backward()  # type: ignore[no-untyped-call]
    else:
        with torch.no_grad():
            model(ids, use_cache=False)


def add_up(watch: Watch, seen: dict[str, Any]) -> None:
    """Add what a mixture did with one sequence to its sums."""
    for name, value in sums_of(tables_of(watch)).items():
        if not torch.isfinite(value).all():
            raise RefusalError(f"{name} of {watch.mixture.name} holds NaN or infinite numbers")
        if name in ("largest_activations", "mask_gradients"):
            # One row for each sequence.
            seen[name] = torch.cat([seen[name], value[None]]) if name in seen else value[None]
        else:
            seen[name] = seen.get(name, 0) + value
    seen["tokens"] += len(watch.tokens)
    seen["sequences"] += 1


def tables_of(watch: Watch) -> dict[str, Tensor]:
    """What sums are made from, by letter, float64 [tokens, experts] but where said."""
    mixture, tokens = watch.mixture, watch.tokens
    nothing = torch.zeros(len(tokens), mixture.units, dtype=torch.float64, device=tokens.device)
    # Who is chosen, and the router's weights of them.
    tables = {"r": nothing.scatter(1, watch.indices, 1.0)}
    tables["g"] = nothing.scatter(1, watch.indices, watch.weights.double())
    if "s" in LETTERS:
        tables["s"] = scores_of_all(watch)
    if "n" in LETTERS or "f" in LETTERS or "e" in LETTERS:
        tables |= by_expert(watch, tables)
    if "a" in LETTERS:
        # The largest magnitude [experts] of what the second matrix reads.
        tables["a"] = nothing.new_zeros(mixture.units)
        for expert in range(mixture.units):
            own = tokens[tables["r"][:, expert] > 0]
            if len(own):
                inner = mixture.experts._apply_gate(own @ mixture.experts.gate_up_proj[expert].T)
                tables["a"][expert] = inner.abs().max()
    if "t" in LETTERS:
        # How much routed experts turn the stream [tokens].
        tables["t"] = watch.turned
    if "w" in LETTERS:
        tables["w"] = losses_without(watch)
    return tables


def by_expert(watch: Watch, tables: dict[str, Tensor]) -> dict[str, Tensor]:
    """Norms of what experts make of their tokens, sums of that [experts, hidden], and pulls."""
    mixture, tokens = watch.mixture, watch.tokens
    norms, pulls = torch.zeros_like(tables["r"]), torch.zeros_like(tables["r"])
    together = norms.new_zeros(mixture.units, tokens.shape[1])
    for expert in range(mixture.units):
        places = tables["r"][:, expert].nonzero().flatten()
        if len(places):
            outputs = outputs_of(mixture, tokens[places], expert)
            norms[places, expert] = outputs.norm(dim=1)
            together[expert] = outputs.sum(0)
            if "e" in LETTERS:
                grad = watch.pull.grad[places].double()
                pulls[places, expert] = (outputs * grad).sum(1)
    return {"n": norms, "f": together, "e": pulls * tables["g"]}


def outputs_of(mixture: Mixture, tokens: Tensor, expert: int) -> Tensor:
    """What one expert makes of tokens [tokens, hidden], float64, before the router's weight."""
    indices = torch.full((len(tokens), 1), expert, device=tokens.device)
    with torch.no_grad():
        found: Tensor = mixture.experts(tokens, indices, tokens.new_ones(len(tokens), 1))
    return found.double()


def scores_of_all(watch: Watch) -> Tensor:
    """What the router scores all experts by: softmax of its logits, or sigmoid where it is."""
    logits = watch.logits.double()
    for scores in (torch.softmax(logits, dim=-1), torch.sigmoid(logits)):
        parts = watch.weights.double() / scores.gather(1, watch.indices)
        if ((parts / parts[:, :1] - 1).abs() < 0.03).all():
            return scores
    raise RefusalError(f"weights of {watch.mixture.name} are parts of no softmax and no sigmoid")


def losses_without(watch: Watch) -> Tensor:
    """The norms [experts] by which the output changes where one expert cannot be chosen."""
    mixture, tokens = watch.mixture, watch.tokens
    if mixture.strata > 1 or mixture.units <= mixture.least:
        raise RefusalError(f"no expert of {mixture.name} can go by itself")
    every = torch.stack([outputs_of(mixture, tokens, at) for at in range(mixture.units)], dim=1)
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    everyone, losses = torch.arange(mixture.units, device=tokens.device), []
    for gone in [None, *range(mixture.units)]:
        places = everyone[everyone != gone] if gone is not None else everyone
        before = narrow(mixture, places)
        try:
            with torch.no_grad():
                _, weights, indices = mixture.router(tokens)
        finally:
            put_back(mixture, before)
        now = (weights.double()[..., None] * every[rows, places[indices]]).sum(1)
        if gone is None:
            dense = now
        else:
            losses.append((now - dense).norm())
    return torch.stack(losses)


def narrow(mixture: Mixture, places: Tensor) -> list[tuple[Any, str, Any]]:
    """Let a router choose among the experts at some places; what it was before."""
    before: list[tuple[Any, str, Any]] = []
    for name, value in router_tensors(mixture.router):
        path, _, key = name.rpartition(".")
        owner = mixture.router.get_submodule(path)
        axis = 0 if name == "weight" else list(value.shape).index(mixture.units)
        part = value.detach().index_select(axis, places)
        is_learned = isinstance(value, nn.Parameter)
        before.append((owner, key, value))
        setattr(owner, key, nn.Parameter(part, value.requires_grad) if is_learned else part)
    for module in mixture.router.modules():
        before += set_counts(module, mixture.units, len(places))
    return before


def put_back(mixture: Mixture, before: list[tuple[Any, str, Any]]) -> None:
    """Let a router be what it was."""
    for owner, key, value in before:
        setattr(owner, key, value)


def set_counts(module: Any, count: int, left: int) -> list[tuple[Any, str, Any]]:
    """Let a module know how many experts are left, where it says how many there are."""
    keys = [key for key in COUNTS if vars(module).get(key) == count]
    for key in keys:
        setattr(module, key, left)
    return [(module, key, count) for key in keys]


def usable_scores(mixture: Mixture, stats: dict[str, Any]) -> Tensor:
    """The scores [experts] of a mixture, from which a choice may be made."""
    scores = score(mixture, stats[mixture.name])
    low, high = (float(bound) for bound in torch.aminmax(scores))
    if not (low > float("-inf") and high < float("inf")):
        raise RefusalError(f"the formula gives {mixture.name} scores that are NaN or infinite")
    if low == high and scores.numel() > 1 and mixture.router.weight.any():
        raise RefusalError(f"the formula gives all experts of {mixture.name} the same score")
    if GUARD == "super":
        scores = scores.masked_fill(is_super(mixture, stats), torch.finfo(torch.float32).max)
    return scores.float().cpu()


def is_super(mixture: Mixture, stats: dict[str, Any]) -> Tensor:
    """Which experts of a mixture have huge activations, bool [experts]."""
    peaks = {name: seen["largest_activations"].amax(0) for name, seen in stats.items()}
    every = torch.cat(list(peaks.values()))
    bound = torch.maximum(every.quantile(0.995), every.max() / 10)
    is_early = list(peaks).index(mixture.name) < 0.75 * len(peaks)
    return (peaks[mixture.name] > bound) & is_early


def drawn(mixture: Mixture) -> Tensor:
    """Numbers [experts] from 0 to 1 that only the name of a mixture and the seed decide."""
    generator = torch.Generator().manual_seed(zlib.crc32(mixture.name.encode(), SEED))
    return torch.rand(mixture.units, generator=generator)


def remove(model: Any, mixtures: list[Mixture], kept: list[Tensor]) -> None:
    """Take experts out of their stacks and routers; a configuration says it if all lose as many."""
    count = mixtures[0].units
    for one, stays in zip(mixtures, kept, strict=True):
        places = stays.nonzero().flatten().to(one.router.weight.device)
        narrow(one, places)
        for key in ("gate_up_proj", "down_proj"):
            stack = getattr(one.experts, key)
            part = stack.detach().index_select(0, places)
            setattr(one.experts, key, nn.Parameter(part, stack.requires_grad))
        for module in one.module.modules():
            set_counts(module, one.units, len(places))
    left = {int(stays.sum()) for stays in kept}
    if len(left) == 1:
        (number,) = left
        set_counts(model, count, number)
        settings = model.config.get_text_config()
        for key in COUNTS:
            if getattr(settings, key, None) == count:
                setattr(settings, key, number)


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the dense model")
    parser.add_argument("text", help="calibration text, one UTF-8 file")
    parser.add_argument("--output", required=True, help="folder for the pruned model")
    parser.add_argument("--sparsity", type=float, required=True, help="share of experts to remove")
    for flag, default in (("--sequences", 128), ("--length", 512)):
        parser.add_argument(flag, type=int, default=default)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = Path(options.text).read_text("utf-8-sig")
    batches = windows(tokenizer, text, options.length)[: options.sequences]
    if not batches:
        raise SystemExit(f"{options.text} has fewer than {options.length} tokens")
    # Computed in float32, saved as it was stored.
    exact = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    try:
        report = prune_(exact, batches, options.sparsity)
        kept = list(report["kept"].values())
        if len({int(stays.sum()) for stays in kept}) > 1:
            raise RefusalError(
                "mixtures keep different numbers of experts, which no class of transformers has; "
                "prune_ leaves such a model in memory, and prunezero saves it"
            )
    except RefusalError as error:
        raise SystemExit(f"refused: {error}") from error
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    remove(model, find_mixtures(model), kept)
    left = [f"{int(stays.sum())} in {name}" for name, stays in report["kept"].items()]
    print(f"sparsity {report['sparsity']:.4f}; experts left: {', '.join(left)}")
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    keep_settings(Path(options.model), Path(options.output), ("config.json",))
