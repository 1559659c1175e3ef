"""How well does a model go on when keys of its prompt leave the cache, recipe by recipe?

    python benchmarks/attention.py                          # all of it: hours on 2 cores
    python benchmarks/attention.py --kept 0.25 --draws 1    # one share of keys, one draw of text
    python benchmarks/attention.py --recipes snapkv,keydiff
    python benchmarks/attention.py --report                 # only the table anew

A prompt of 768 tokens is read densely, a share of its keys stays in each layer (the first four and
the last 32 among them), and 256 tokens follow, predicted from what is left: once the text as it was
written, and once the prompt's own beginning behind text of another window, which only its own keys
foretell. Each recipe of `baselines/` that keeps keys, or links to them, is measured as
published, and, where it can be, with the same blocks of 16 keys for all heads of a layer, which is
what servers with paged caches can do. Finished rows, one for each window, are kept in
docs/results/attention.jsonl, so a second start goes on behind the last one;
docs/results/attention.md is the table.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from attention_report import CONDITIONS, report
from pruning import cpu_name
from rows import append, read
from torch import Tensor

from prunezero.errors import PruneZeroError
from prunezero.models.attending.continuing import (
    Continuations,
    dense_measures,
    read_densely,
    recall_windows,
)
from prunezero.models.attending.observing import (
    Measured,
    merged,
    query_moments,
    streaming_errors,
)
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.loading.load import load_model
from prunezero.models.text.splits import load_text, windows
from prunezero.pruning.attention import kept_row, policy_of
from prunezero.pruning.recipes.recipe import Recipe, published_of
from prunezero.pruning.testbed import with_choices

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
# What tells a row from every other under the same conditions.
PLACE = ("recipe", "form", "kept", "draw", "window")
# How a recipe is read, beside as it was published.
SHARED = "the same blocks of 16 for all heads"

Row = dict[str, Any]


def main() -> None:
    """Measure what is missing, then write the table."""
    arguments = parsed()
    path = RESULTS / "attention.jsonl"
    if not arguments.report:
        measure(arguments, path)
    path.with_suffix(".md").write_text("\n".join(report(read(path))) + "\n")
    print(path.with_suffix(".md").read_text())


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--recipes", default="", help="names or files, by commas; else all")
    parser.add_argument("--kept", default="0.5,0.25,0.1", help="shares of keys, by commas")
    parser.add_argument("--draws", type=int, default=3, help="of windows of validation text")
    parser.add_argument("--windows", type=int, default=12, help="of each draw")
    parser.add_argument("--prompt", type=int, default=768, help="tokens of a prompt")
    parser.add_argument("--following", type=int, default=256, help="tokens behind it")
    parser.add_argument("--repeated", type=int, default=192, help="tokens that come again")
    parser.add_argument("--skipped", type=int, default=16, help="of these, that are only given")
    parser.add_argument("--calibration-windows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    arguments.cpu = cpu_name()
    return arguments


def measure(arguments: argparse.Namespace, path: Path) -> None:
    """Append the rows that the file does not hold yet, window after window."""
    conditions = {key: getattr(arguments, key) for key in (*CONDITIONS, "threads", "cpu")}
    forms = list(wanted(arguments.recipes))
    shares = [float(share) for share in arguments.kept.split(",")]
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model, dtype="float32")
    every = validation_windows(model, arguments)
    known: Mapping[int, Measured] = {}
    done = {place_of(row) for row in read(path)}
    for number in range(len(every)):
        head = {"draw": number // arguments.windows, "window": number % arguments.windows}
        missing = [
            (recipe, form, kept)
            for recipe, form in forms
            for kept in shares
            if place_of(conditions | head | named(recipe, form, kept)) not in done
        ]
        if not missing:
            continue
        if not known and any("EXPECTED" in recipe.features for recipe, _, _ in missing):
            known = query_moments(model, calibration_windows(model, arguments), arguments.prompt)
        if any("STREAM" in recipe.features for recipe, _, _ in missing) and not is_streaming(known):
            known = merged(known, streaming_of(model, arguments))
        texts = texts_of(model, every, number, arguments)
        dense = conditions | head | {"recipe": "dense", "form": "", "kept": 1.0}
        if place_of(dense) not in done:
            append(path, dense | dense_losses(model, texts))
        for recipe, form, kept in missing:
            row = conditions | head | named(recipe, form, kept)
            row |= measured_row(model, recipe, kept, texts, known)
            append(path, row)
            print(told(row), flush=True)


def wanted(names: str) -> Iterator[tuple[Recipe, str]]:
    """Each recipe as published, and with blocks that all heads of a layer share."""
    chosen = [Recipe.load(name) for name in names.split(",") if name]
    for recipe in chosen or [*published_of("kv_column"), *published_of("link")]:
        yield recipe, "as published"
        if shared := in_shared_blocks(recipe):
            yield shared, SHARED


def in_shared_blocks(recipe: Recipe) -> Recipe | None:
    """The recipe with the same blocks for all heads; None where its budget is spent otherwise."""
    if recipe.unit.word != "kv_column":
        return None
    numbers = recipe.unit.options.model_dump(exclude_defaults=True)
    blocks = {"kv_column": {**numbers, "share": "layer", "block": 16}}
    # The last layers of falling budgets have room for no block beside those that always stay.
    if {"when", "falling"} & set(numbers) or recipe.compare == "layer":
        return None
    try:
        changed = with_choices(recipe, unit=blocks)
        policy_of(changed, 0.5)
    except PruneZeroError:
        return None
    return changed


def validation_windows(model: LanguageModel, arguments: argparse.Namespace) -> Tensor:
    """Token ids [draws x windows, length] of validation text."""
    count = arguments.draws * arguments.windows
    length = arguments.prompt + arguments.following
    return windows(load_text(arguments.text), "validation", model, length=length, count=count)


def calibration_windows(model: LanguageModel, arguments: argparse.Namespace) -> Tensor:
    """Token ids [count, length] of calibration text, as long as prompts and what follows."""
    length, count = arguments.prompt + arguments.following, arguments.calibration_windows
    return windows(load_text(arguments.text), "calibration", model, length=length, count=count)


def is_streaming(known: Mapping[int, Measured]) -> bool:
    """Whether how heads stream was measured."""
    return any(one.streaming_error is not None for one in known.values())


def streaming_of(model: LanguageModel, arguments: argparse.Namespace) -> dict[int, Measured]:
    """How heads stream on beginnings of calibration text that come again, by layer."""
    again = recall_windows(
        calibration_windows(model, arguments),
        prompt=arguments.prompt,
        repeated=arguments.repeated,
        language_model=model,
    )
    numbers = policy_of(Recipe.load("duo_heads"), 0.5)
    return streaming_errors(
        model, again, arguments.prompt, sinks=numbers.sinks, recent=numbers.recent
    )


def texts_of(
    model: LanguageModel, every: Tensor, number: int, arguments: argparse.Namespace
) -> dict[str, Continuations]:
    """One window that goes on as it is, and its beginning behind another one."""
    pair = torch.stack([every[number], every[(number + 1) % len(every)]])
    again = recall_windows(
        pair, prompt=arguments.prompt, repeated=arguments.repeated, language_model=model
    )
    return {
        "text": read_densely(model, every[number : number + 1], prompt=arguments.prompt),
        "recall": read_densely(
            model, again[:1], prompt=arguments.prompt, skipped=arguments.skipped
        ),
    }


def dense_losses(model: LanguageModel, texts: Mapping[str, Continuations]) -> Row:
    """What the dense model loses, in nats per token, and what its cache holds."""
    found: Row = {}
    for name, text in texts.items():
        found[f"{name}_loss"] = dense_measures(model, text)["window_losses"][0]
        found["kv_bytes"] = text.dense_bytes
    return found


def measured_row(
    model: LanguageModel,
    recipe: Recipe,
    kept: float,
    texts: Mapping[str, Continuations],
    known: Mapping[int, Measured],
) -> Row:
    """What a recipe is worth on one window at a share of keys, or why it cannot be measured."""
    try:
        row = kept_row(model, recipe, kept, texts, known)
    except PruneZeroError as error:
        return {"refused": str(error)}
    found = {key: row[key] for key in ("signal", "simulated", "kv_bytes", "links", "seconds")}
    for name in texts:
        found[f"{name}_loss"] = row[f"{name}_window_losses"][0]
        found |= {f"{name}_{key}": row[f"{name}_{key}"] for key in ("kl", "top1_agreement")}
    return found


def named(recipe: Recipe, form: str, kept: float) -> Row:
    """Where a row stands among those of one window."""
    return {"recipe": recipe.name, "form": form, "kept": kept}


def place_of(row: Row) -> tuple[Any, ...]:
    """The place of a row in the file."""
    return tuple(row.get(key) for key in (*PLACE, *CONDITIONS))


def told(row: Row) -> str:
    """One row for reading."""
    parts = [row["recipe"], row["form"], row["kept"], row["draw"], row["window"]]
    found = row.get("refused") or f"text {row['text_kl']:.4f} recall {row['recall_kl']:.4f}"
    return " ".join(map(str, [*parts, found]))


if __name__ == "__main__":
    main()
