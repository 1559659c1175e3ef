"""The README.md that lies beside a pruned model: what was done to it, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prunezero.formula.criterion import Criterion
from prunezero.models.measures import SHARES
from prunezero.report.quoting import markdown_block, markdown_code, markdown_text

COLUMNS = {
    "model": "Model",
    "method": "Method",
    "sparsity": "Sparsity",
    "removed": "Removed",
    "removed_of": "Of",
    "pattern": "Pattern",
    "sequence_length": "Sequence length (tokens)",
    "windows_begin_with": "Windows begin with",
    "seed": "Seed",
    "test_perplexity": "Test perplexity",
    "validation_perplexity": "Validation perplexity",
    "search_perplexity": "Search perplexity",
    "kl": "KL to dense (nats)",
    "top1_agreement": "Top-1 agreement",
    "top5_agreement": "Top-5 agreement",
    "acceptance": "Speculative acceptance",
}
ZEROS_TAKE_ROOM = (
    "Zeros do not make a model smaller or faster by themselves: the files keep the size of the "
    "dense model, and ordinary kernels multiply by the zeros."
)
# A hub id has one slash and these letters; anything else is a folder of the author's machine.
HUB_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./")


def model_card(
    base_model: str,
    criterion: Criterion,
    results: Sequence[Mapping[str, Any]],
    *,
    criteria: Mapping[str, Criterion] | None = None,
    then: Sequence[tuple[str, Criterion]] = (),
    recipe: str = "",
    license_id: str = "",
    note: str = "",
    size: str = ZEROS_TAKE_ROOM,
    several: str = "weights",
) -> str:
    """The card's text: front matter of the model hub, then the report.

    Args:
        base_model: hub id or folder of the dense model.
        results: one row per measured model, with keys of `COLUMNS` (`method` names the row);
            columns that no row fills are left out.
        criteria: formulas of some layers instead, by pattern.
        then: units that went after those, on the model without them, and their formulas.
        recipe: the recipe's YAML, shown whole.
        license_id: the base model's license when it is known, such as "apache-2.0".
        note: Markdown to add at the end.
        size: what pruning makes of the size of the files, in a sentence or two.
        several: what was removed, in the plural.
    """
    what = "are exact zeros" if size == ZEROS_TAKE_ROOM else "are gone"
    parts = [
        _front_matter(base_model, license_id, is_sparse=several == "weights"),
        size,
        f"# {markdown_text(base_model.rstrip('/').split('/')[-1])}, pruned\n\n"
        f"Pruned by prunezero: the {several} with the lowest value of this formula {what}."
        f"\n\n$$ {criterion.latex} $$\n\nAs text: {markdown_code(criterion.text)}",
    ]
    parts += [
        f"Layers {markdown_code(layers)} have a formula of their own:\n\n$$ {own.latex} $$\n\n"
        f"As text: {markdown_code(own.text)}"
        for layers, own in (criteria or {}).items()
    ]
    parts += [
        f"Then the {several} with the lowest value of another formula went, on the model without "
        f"those:\n\n$$ {own.latex} $$\n\nAs text: {markdown_code(own.text)}"
        for several, own in then
    ]
    if results:
        parts.append(f"## Results\n\n{results_table(results)}\n\nPerplexity: lower is better.")
    if recipe:
        parts.append(f"## Recipe\n\n{markdown_block(recipe, 'yaml')}")
    return "\n\n".join([*parts, *([note] if note else [])]) + "\n"


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of the rows; empty columns are left out."""
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in results)]
    lines = [" | ".join(COLUMNS[key] for key in keys), " | ".join("---" for _ in keys)]
    lines += [" | ".join(_cell(key, row.get(key)) for key in keys) for row in results]
    return "\n".join(f"| {line} |" for line in lines)


def _front_matter(base_model: str, license_id: str, *, is_sparse: bool) -> str:
    import yaml

    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", *(["sparse"] if is_sparse else []), "prunezero"],
    }
    if is_hub_id(base_model):
        fields = {"base_model": base_model, **fields}
    if license_id:
        fields["license"] = license_id
    return f"---\n{yaml.safe_dump(fields, sort_keys=False).rstrip()}\n---"


def is_hub_id(name: str) -> bool:
    """Whether a model's name may be an id on the model hub: the hub refuses anything else."""
    parts = name.split("/")
    return (
        len(parts) == 2
        and set(name) <= HUB_LETTERS
        and all(part and part[0] not in ".-" and part[-1] not in ".-" for part in parts)
    )


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key.endswith("perplexity"):
        return f"{value:.2f}"
    if key == "kl":
        return f"{value:.4f}"
    if key in ("removed", *SHARES):
        return f"{value:.2%}"
    return (
        f"{value:.0%}"
        if key == "sparsity" and round(value * 100, 6) % 1 == 0
        else markdown_text(value)
    )
