"""How does an exported page watch a model at work? Bodies of its hooks, for the sums it needs."""

from __future__ import annotations

from prunezero.report.export.page_lines import sum_lines
from prunezero.scoring.statistics import LETTERS, SUMS


def listen_body(sums: frozenset[str]) -> list[str]:
    """The body of `listen`: hooks for the wanted sums alone."""
    added = {source: sum_lines(source, sums) for source in LETTERS}
    has_gradients = bool(added["gradient"] or added["output gradients"])
    lines = ["hooks: list[Any] = []"]
    if added["inputs"] or added["outputs"]:
        # The pass that computes gradients runs the same text a second time.
        body = ["if torch.is_grad_enabled():", "    return"] if has_gradients else []
        for source, letter, values in (("inputs", "x", "args[0]"), ("outputs", "y", "output")):
            if added[source]:
                body.append(f"{letter} = {values}.detach().reshape(-1, {values}.shape[-1])")
                body += [*added[source], f'count_tokens(stats, "{source}", {values})']
        lines += _hook("add_forward", "module: Any, args: Any, output: Any", body)
        lines.append("hooks.append(module.register_forward_hook(add_forward))")
    if has_gradients:
        body = ["if torch.is_grad_enabled():", '    count_tokens(stats, "gradients", args[0])']
        lines += _hook("count_tokens_of_gradients", "module: Any, args: Any", body)
        lines.append("hooks.append(module.register_forward_pre_hook(count_tokens_of_gradients))")
        body = []
        if added["gradient"]:
            body.append("is_linear = isinstance(module, nn.Linear)")
            body.append("g = (parameter.grad if is_linear else parameter.grad.T).contiguous()")
        body += [*added["gradient"], "parameter.grad = None"]
        lines += _hook("add_gradient", "parameter: Any", body)
        lines.append("module.weight.requires_grad_(True)")
        lines.append("hooks.append(module.weight.register_post_accumulate_grad_hook(add_gradient))")
    if added["output gradients"]:
        body = []
        if any(SUMS[name].with_inputs for name in sums):
            body.append("x = inputs.detach().reshape(-1, inputs.shape[-1])")
        body += ["d = gradient.reshape(-1, gradient.shape[-1])", *added["output gradients"]]
        lines += _hook("add_output_gradient", "gradient: Tensor, inputs: Tensor", body)
        body = ["if output.requires_grad:"]
        body += ["    output.register_hook(lambda d: add_output_gradient(d, args[0]))"]
        lines += _hook("follow_output", "module: Any, args: Any, output: Any", body)
        lines.append("hooks.append(module.register_forward_hook(follow_output))")
    return [*lines, "return hooks"]


def _hook(name: str, arguments: str, body: list[str], gives: str = "None") -> list[str]:
    return ["", f"def {name}({arguments}) -> {gives}:", *(f"    {line}" for line in body), ""]


def read_body(sums: frozenset[str]) -> list[str]:
    """The body of `read`: a forward pass, one with a backward pass, or both."""
    lines = []
    sources = {SUMS[name].source for name in sums}
    if not sums or sources & {"inputs", "outputs"}:
        lines += ["with torch.no_grad():", "    model(ids, use_cache=False)"]
    if sources & {"gradient", "output gradients", "input gradients"}:
        lines += [
            "with torch.enable_grad():",
            "    logits = model(ids, use_cache=False).logits[0, :-1].float()",
            "    loss = nn.functional.cross_entropy(logits, ids[0, 1:])",
            "    if not torch.isfinite(loss):",
            '        raise RefusalError(f"the loss of a sequence is {float(loss.detach())}")',
            "    loss.backward()",
        ]
    return lines


def listen_to_reader(sums: frozenset[str]) -> list[str]:
    """The body of the function that hooks a reader of units: on its inputs and their gradients."""
    inputs, gradients = (sum_lines(source, sums) for source in ("inputs", "input gradients"))
    lines = ["hooks: list[Any] = []"]
    if inputs:
        # The pass that computes gradients runs the same text a second time.
        body = ["if not torch.is_grad_enabled():"]
        values = ["x = args[0].detach().reshape(-1, args[0].shape[-1])", *inputs]
        body += [f"    {line}" for line in [*values, 'count_tokens(stats, "inputs", args[0])']]
        lines += _hook("add_inputs", "module: Any, args: Any", body)
        lines.append("hooks.append(module.register_forward_pre_hook(add_inputs))")
    if gradients:
        body = ["x = inputs.detach().reshape(-1, inputs.shape[-1])"]
        body += ["e = gradient.reshape(-1, gradient.shape[-1])", *gradients]
        lines += _hook("add_input_gradients", "gradient: Tensor, inputs: Tensor", body)
        # A view of its own: others may read the same tensor, and their gradients are not meant.
        body = ["if not args[0].requires_grad:", "    return None"]
        body += ["own = args[0].view_as(args[0])"]
        body += ["own.register_hook(lambda e: add_input_gradients(e, args[0]))"]
        lines += _hook(
            "follow_inputs", "module: Any, args: Any", [*body, "return (own, *args[1:])"], "Any"
        )
        lines.append("hooks.append(module.register_forward_pre_hook(follow_inputs))")
    return [*lines, "return hooks"]
