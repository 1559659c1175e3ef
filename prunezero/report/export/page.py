"""A criterion as one page of plain Python: the template with its formula and sums exchanged.

`pruner_template.py` is a real program that is tested as it stands. Export replaces its docstring,
its constants and three of its functions, by their places in the syntax tree, and puts the functions
of `page_parts.py` in, so the rest of the page is read and tested code.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Any

from prunezero.errors import OutputError
from prunezero.files.atomic import write_text
from prunezero.formula.code import torch_lines
from prunezero.formula.criterion import Criterion
from prunezero.formula.vocabulary import FEATURES
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.report.export.page_lines import feature_lines, sum_lines
from prunezero.report.export.page_text import check_page, exchange, parts
from prunezero.report.quoting import python_docstring, python_string, python_strings
from prunezero.report.tracking.records import shown
from prunezero.scoring.statistics import LETTERS, SUMS
from prunezero.searching.experiment.baselines import SAME_TERMS
from prunezero.searching.experiment.budgets import seeds_of, windows_of
from prunezero.searching.experiment.objectives import PERPLEXITY

TEMPLATE = Path(__file__).with_name("pruner_template.py")


def write_pruner(recipe: Recipe, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        OutputError: the recipe makes a choice that one page cannot follow, or the file cannot be
            written.
    """
    write_text(pruner_page(recipe), path)


def pruner_page(recipe: Recipe) -> str:
    """The page's text: it compiles, and it imports nothing of prunezero.

    Raises:
        OutputError: the recipe makes a choice that one page cannot follow.
    """
    refuse_unfit(recipe)
    source = TEMPLATE.read_text(encoding="utf-8")
    features = _features(recipe)
    sums = frozenset(name for feature in features for name in FEATURES[feature].sums)
    new = {
        "score": _score_body(recipe),
        "listen": _listen_body(sums),
        "read": _read_body(sums),
        "COMPARE": python_string(recipe.compare),
        "PATTERN": python_string(recipe.pattern),
        "TARGETS": python_strings(recipe.targets),
        "IGNORE": python_strings(recipe.ignore),
        "OWN": python_strings(tuple(recipe.criteria)),
        "SUMS": python_strings(tuple(sorted(sums))),
        "DAMPING": repr(recipe.damping),
        "EQUAL_IN_ROWS": repr(any(one.shape == "row" for one in recipe.formulas)),
    }
    page = exchange(source, new, _docstring(recipe), parts(features))
    check_page(page)
    return page


def refuse_unfit(recipe: Recipe) -> None:
    """Raise OutputError where a page of one dense pass could not do what the recipe says."""
    reason = no_page(recipe)
    if reason:
        raise OutputError(reason)


def no_page(recipe: Recipe) -> str:
    """Why no page of one dense pass could do what the recipe says; nothing where one can."""
    units = [] if recipe.unit.is_usual else [f"unit: {recipe.unit.text}"]
    found = units + [f"{choice.arrow}: {choice.text}" for choice in recipe.extras]
    if found:
        return (
            f"{recipe.name} has {', '.join(found)}, which a one-page pruner cannot follow; use "
            "`prunezero prune` with the recipe"
        )
    if recipe.statistics != "dense":
        return (
            f"{recipe.name} has statistics: {recipe.statistics}, but a one-page pruner looks at "
            "the dense model alone; add --statistics dense to export it so"
        )
    return ""


def _features(recipe: Recipe) -> list[str]:
    """All that some formula looks at, each once."""
    return list(dict.fromkeys(name for one in recipe.formulas for name in one.features))


def _score_body(recipe: Recipe) -> list[str]:
    """The body of `score`: formulas of some layers first, then that of all others."""
    lines = []
    for place, own in enumerate(recipe.criteria.values()):
        lines.append(f"if fits(OWN[{place}], layer):")
        lines += [f"    {line}" for line in _score_lines(own)]
    return [*lines, *_score_lines(recipe.criterion)]


def _score_lines(criterion: Criterion) -> list[str]:
    lines = [line for name in criterion.features for line in feature_lines(name)]
    return [*dict.fromkeys(lines), *torch_lines(criterion), "return score"]


def _listen_body(sums: frozenset[str]) -> list[str]:
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


def _hook(name: str, arguments: str, body: list[str]) -> list[str]:
    return ["", f"def {name}({arguments}) -> None:", *(f"    {line}" for line in body), ""]


def _read_body(sums: frozenset[str]) -> list[str]:
    """The body of `read`: a forward pass, one with a backward pass, or both."""
    lines = []
    sources = {SUMS[name].source for name in sums}
    if not sums or sources & {"inputs", "outputs"}:
        lines += ["with torch.no_grad():", "    model(ids, use_cache=False)"]
    if sources & {"gradient", "output gradients"}:
        lines += [
            "with torch.enable_grad():",
            "    logits = model(ids, use_cache=False).logits[0, :-1].float()",
            "    loss = nn.functional.cross_entropy(logits, ids[0, 1:])",
            "    if not torch.isfinite(loss):",
            '        raise RefusalError(f"the loss of a sequence is {float(loss.detach())}")',
            "    loss.backward()",
        ]
    return lines


def _docstring(recipe: Recipe) -> str:
    """The page's docstring, safe to stand between triple quotes."""
    head = f"{recipe.name}: prune a language model with the criterion `{recipe.text}`."
    body = f"Source: {recipe.source}" if recipe.source else ""
    zeros = "Zeroes the lowest scores of each group. Zeros alone make no model smaller or faster."
    command = "    python pruner.py MODEL_FOLDER TEXT_FILE --sparsity 0.5 --output PRUNED_FOLDER"
    results = map(_sentence, recipe.provenance.get("measured", []))
    return paragraphs(head, body, *results, f"{zeros} Usage:", command)


def _sentence(row: dict[str, Any]) -> str:
    """A measured result, for the docstring of a page."""
    validation, test = (
        shown(PERPLEXITY, row.get(key)) for key in ("validation_perplexity", "test_perplexity")
    )
    mean = "geometric mean of " if row.get("regimes") else ""
    return (
        f"{_named(row)}: {mean}test perplexity {test}, validation {validation}, at sparsity "
        f"{row['sparsity']:g} ({row['pattern']}), {windows_of(row)}, {seeds_of(row)}."
    )


def _named(row: dict[str, Any]) -> str:
    """What was measured; of a published formula on the terms of the recipe, that it was."""
    name = str(row["recipe"])
    is_on_same_terms = name.endswith(SAME_TERMS)
    return f"{name.removesuffix(SAME_TERMS)} with these choices" if is_on_same_terms else name


def paragraphs(head: str, *others: str) -> str:
    """The text of a page's docstring, safe between triple quotes; indented parts stay as they are.

    Empty parts are left out.
    """
    parts = [part if part.startswith("    ") else fill(part, 99) for part in others if part]
    text = "\n\n".join([fill(head, 96), *parts])
    return python_docstring(text)
