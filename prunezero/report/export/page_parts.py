"""What every exported page does alike: find layers, and refuse what the engine refuses.

The functions stand here as they stand in a page, behind those of `pruner_template.py`.
"""

import re
import signal
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.report.export.expert_parts import STACKS, Expert


class RefusalError(ValueError):
    """What was asked for would give no mask, or one that says nothing."""


def linear_maps(model: Any) -> tuple[dict[str, Any], list[str]]:
    """Weight matrices of the decoder blocks by name, shared once; names of those not called."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise RefusalError(
            "the model is an encoder-decoder; only decoder-only models can be pruned"
        )
    prefix, blocks = block_list(model)
    found: dict[str, Any] = {}
    for index, block in enumerate(blocks):
        routed = any("expert" in path for path, _ in block.named_modules())
        for path, module in block.named_modules():
            name = f"{prefix}.{index}.{path}"
            if holds_stacks(name, path, module):
                places = [(place, one) for place in range(len(module.down_proj)) for one in STACKS]
                found |= {f"{name}.{n}.{one}": Expert(module, one, n) for n, one in places}
            elif is_linear(module) and not (routed and is_router(path, module)):
                found[name] = module
    for name, module in found.items():
        weight = module.weight
        if weight.is_meta or weight.dim() != 2 or weight.dtype.itemsize < 2:
            raise RefusalError(f"the weight of {name} is quantized, packed or not loaded")
    called = calls(model, found)
    # Text decides about experts.
    never = [name for name in found if name not in called and "expert" not in name]
    first: dict[Any, tuple[str, Any]] = {}
    for name, module in found.items():
        if name not in never:
            first.setdefault((module.weight.data_ptr(), module.weight.shape), (name, module))
    return dict(first.values()), never


def holds_stacks(name: str, path: str, module: Any) -> bool:
    """Whether a module holds matrices of experts; those of another layout are refused."""
    three = {key for key, one in module.named_parameters(recurse=False) if one.dim() == 3}
    if not three or not ("expert" in path or three <= {*STACKS}):
        return False
    shapes = {key: tuple(one.shape) for key, one in module.named_parameters()}
    if shapes.keys() == {*STACKS} and hasattr(module, "_apply_gate"):
        count, hidden, inner = shapes["down_proj"]
        if shapes["gate_up_proj"] == (count, 2 * inner, hidden):
            return True
    raise RefusalError(f"{name} holds experts as {shapes}; this layout is not supported")


def is_router(path: str, module: Any) -> bool:
    """Whether a linear map beside experts decides how much of whom a token gets."""
    is_gate = "expert" in path and min(module.weight.shape) == 1
    return is_gate or path.split(".")[-1] in ("gate", "router")


def block_list(model: Any) -> tuple[str, Any]:
    """The name and list of the decoder blocks."""
    lists = {name: m for name, m in model.named_modules() if is_block_list(name, m)}
    outer = [name for name in lists if not any(name.startswith(f"{o}.") for o in lists)]
    if not outer:
        raise RefusalError("the model has no list of equal decoder blocks with linear layers in it")
    prefix = max(outer, key=lambda name: len(lists[name]))
    return prefix, lists[prefix]


def calls(model: Any, layers: dict[str, Any]) -> list[str]:
    """Names of layers in the order in which a forward pass first calls them."""
    order: dict[str, None] = {}
    versions = [parameter._version for parameter in model.parameters()]
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: order.update({name: None}))
        for name, module in layers.items()
    ]
    try:
        with torch.no_grad():
            model(torch.tensor([[0, 1]]).to(next(model.parameters()).device), use_cache=False)
    except Exception:
        # Whoever needs the pass is told of it there.
        return list(layers)
    finally:
        for hook in hooks:
            hook.remove()
    if versions != [parameter._version for parameter in model.parameters()]:
        raise RefusalError("the model's own forward pass changes its weights")
    return list(order)


def is_linear(module: Any) -> bool:
    """Whether a module is a linear map; GPT-2's Conv1D keeps its weight as [in, out]."""
    return isinstance(module, nn.Linear) or "Conv1D" in [k.__name__ for k in type(module).__mro__]


def is_block_list(name: str, module: Any) -> bool:
    """Whether a module is a list of equal blocks with linear maps in them."""
    equal = isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    return equal and "expert" not in name and any(is_linear(m) for m in module.modules())


def chosen(
    model: Any, layers: dict[str, Any], targets: list[str], ignore: list[str]
) -> dict[str, Any]:
    """Those of the layers that some patterns mean, all if there are none, and others do not."""
    modules = [*(name for name, _ in model.named_modules()), *layers]
    for pattern, names in [*((t, layers) for t in targets), *((i, modules) for i in ignore)]:
        if not any(fits(pattern, name) for name in names):
            raise RefusalError(f"{pattern!r} matches no layer; there are {list(layers)[:3]}...")
    found = {
        name: module
        for name, module in layers.items()
        if (not targets or any(fits(pattern, name) for pattern in targets))
        and not any(fits(pattern, name) for pattern in ignore)
    }
    if not found:
        raise RefusalError("no layer is left to prune; IGNORE takes away all that TARGETS choose")
    return found


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern means a layer: by its full name, its last parts, or "re:REGEX"."""
    if not pattern.startswith("re:"):
        return name == pattern or name.endswith(f".{pattern}")
    try:
        return found_in_time(pattern.removeprefix("re:"), name)
    except (re.error, RecursionError, OverflowError) as error:
        raise RefusalError(f"{pattern!r} is not a regular expression: {error}") from error


def found_in_time(expression: str, name: str) -> bool:
    """Whether an expression is found in a name within a quarter of a second of the processor."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "SIGVTALRM"
    ):
        return re.search(expression, name) is not None

    def stop(number: int, frame: Any) -> None:
        raise RefusalError(f"the expression {expression!r} takes too long on {name}")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.25)
    try:
        return re.search(expression, name) is not None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def matrix(module: Any) -> Tensor:
    """The weight [out, in] of a linear map, sharing its memory."""
    weight: Tensor = module.weight.detach()
    return weight if isinstance(module, nn.Linear) else weight.T


def windows(tokenizer: Any, text: str, length: int) -> list[Tensor]:
    """Sequences [1, length] of a text, each begun as the tokenizer by itself begins one."""
    bare = tokenizer("The text.", add_special_tokens=False).input_ids
    whole = tokenizer("The text.").input_ids
    places = range(len(whole) - len(bare) + 1)
    first = whole[: next((n for n in places if whole[n : n + len(bare)] == bare), 0)]
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    each = length - len(first)
    starts = range(0, len(ids) - each + 1, each) if each > 0 else ()
    return [torch.tensor([[*first, *ids[start : start + each]]]) for start in starts]


def check_text(model: Any, batches: list[Tensor]) -> None:
    """Refuse sequences of token ids that the model cannot be run on."""
    vocabulary = len(model.get_input_embeddings().weight)
    longest = getattr(model.config, "max_position_embeddings", None) or float("inf")
    if not batches:
        raise RefusalError("there is no text to run the model on: 0 sequences")
    for ids in batches:
        if ids.dim() != 2 or len(ids) != 1 or ids.dtype != torch.int64:
            raise RefusalError(f"token ids must be int64 [1, length] but are {ids.dtype}")
        if not 2 <= ids.shape[1] <= longest:
            raise RefusalError(f"{ids.shape[1]} tokens; the model takes 2 to {longest} at once")
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise RefusalError("a token id is not in the model's vocabulary")


def add(stats: dict[str, Any], source: str, name: str, value: Tensor) -> None:
    """Add to a sum of a layer what some values give."""
    check_values(stats, source, value)
    stats[name] += value


def add_row(stats: dict[str, Any], source: str, name: str, value: Tensor) -> None:
    """Keep what the values of a sequence give, one row for each."""
    check_values(stats, source, value)
    stats[name] = torch.cat([stats[name], value[None]]) if name in stats else value[None]


def check_values(stats: dict[str, Any], source: str, value: Tensor) -> None:
    """Refuse numbers that are none."""
    if not torch.isfinite(value).all():
        raise RefusalError(f"the {source} of {stats['layer']} hold NaN or infinite numbers")


def count_tokens(stats: dict[str, Any], source: str, values: Tensor) -> None:
    """Count the tokens and sequences that inputs or outputs of a layer are of."""
    stats[f"tokens of {source}"] += values[..., 0].numel()
    stats[f"sequences of {source}"] += len(values) if values.dim() == 3 else 1


def counted(stats: dict[str, Any], sums: list[str], whole: dict[str, int]) -> dict[str, Any]:
    """The sums of a layer with the tokens and sequences that they are of."""
    of_gradients = [name for name in sums if "gradient" in name]
    if not stats.keys() >= {*sums} - {*of_gradients}:
        raise RefusalError(f"no token of the text reaches {stats['layer']}, so nothing ranks it")
    if not all(torch.as_tensor(stats[name]).any() for name in of_gradients):
        raise RefusalError(f"all gradients of {stats['layer']} are zero, so they rank nothing")
    for word, total in whole.items():
        seen = [value for name, value in stats.items() if name.startswith(f"{word} of")]
        # Text decides how many tokens come to an expert, in whatever sequences.
        stats[word] = max(seen) if seen and word == "tokens" else total
    return stats


def keep_settings(dense: Path, pruned: Path, anew: tuple[str, ...] = ()) -> None:
    """Put settings of the dense model beside the weights, byte for byte but for some names.

    A library that writes settings anew writes its own dialect of them, and weights for one user.
    """
    for path in pruned.iterdir():
        own = dense / path.name
        is_kept = path.suffix in (".json", ".jinja") and ".index." not in path.name
        if own.is_file() and is_kept and path.name not in anew:
            path.write_bytes(own.read_bytes())
        if path.is_file():
            path.chmod((pruned / "config.json").stat().st_mode)


def inverse_factor(stats: dict[str, Any], damping: float) -> Tensor:
    """The upper Cholesky factor [in, in] of the inverse of the damped Gram matrix, float64."""
    if not torch.isfinite(stats["gram"]).all():
        raise RefusalError(f"the Gram matrix of {stats['layer']} holds NaN or infinite numbers")
    gram = stats["gram"].double() / stats["sequences"]
    diagonal = gram.diagonal().clone()
    dead = diagonal == 0
    diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
    while True:
        gram.diagonal().copy_(diagonal + damping * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(gram.flip(0, 1))
        if not failed:
            upper = inverse_of_upper(lower.flip(0, 1))
            if torch.isfinite(upper.sum()):
                return upper
        if damping >= 1.0:
            raise RefusalError(f"the Gram matrix of {stats['layer']} is not positive definite")
        damping = min(10 * damping, 1.0)


def inverse_of_upper(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix, by halves."""
    if len(upper) <= 192:
        return torch.linalg.solve_triangular(upper, torch.eye(len(upper)).to(upper), upper=True)
    half = len(upper) // 2
    found = torch.zeros_like(upper)
    found[:half, :half] = inverse_of_upper(upper[:half, :half])
    found[half:, half:] = inverse_of_upper(upper[half:, half:])
    between = found[:half, :half] @ upper[:half, half:]
    torch.mm(between, found[half:, half:], out=found[:half, half:]).neg_()
    return found
