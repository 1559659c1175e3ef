"""Which criteria of keys are best at text that goes on, at recall, and at anything between?

    python benchmarks/attention_search.py                         # hours on 2 cores
    python benchmarks/attention_search.py --candidates 12 --windows 2
    python benchmarks/attention_search.py --space attention_oracle --kept 0.1

Formulas of the space, and numbers of its recipes, are searched by KL to the dense model on two
kinds of text at once (`benchmarks/attention.py` says which). The front, and every published recipe
that looks at no more, are then measured on validation windows, which the search never saw. A folder
under --output holds the log, the table, a picture and the recipes of the front; a second start goes
on behind the last line of the log.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor

from prunezero.files.atomic import write_json, write_text
from prunezero.models.attending.continuing import read_densely, recall_windows
from prunezero.models.attending.observing import query_moments
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.loading.load import load_model
from prunezero.models.text.splits import load_text, windows
from prunezero.report.plots.fronts import pareto_picture
from prunezero.searching.attending.finalists import front_recipes, table, validated_rows
from prunezero.searching.attending.rungs import Texts
from prunezero.searching.attending.search import Experiment, Found, Tried, search_attention
from prunezero.searching.spaces.space import SearchSpace


def main() -> None:
    """Search, then measure the front and its rivals on other windows."""
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    space = SearchSpace.load(arguments.space)
    asked = Experiment(
        space, arguments.kept, arguments.candidates, arguments.seed, arguments.layers
    )
    model = load_model(arguments.model, dtype="float32")
    known = None
    if "EXPECTED" in space.features:
        known = query_moments(model, windows_of(model, "calibration", arguments), arguments.prompt)
    folder = arguments.output / f"{space.name}-{arguments.kept:g}-{arguments.seed}"
    texts = texts_of(model, windows_of(model, "search", arguments), arguments)
    log = folder / "search.jsonl"
    found = search_attention(model, texts, asked, known=known, log=log, told=tell)
    recipes = front_recipes(found, asked, space.name)
    for recipe in recipes:
        (folder / "front").mkdir(exist_ok=True)
        recipe.save(folder / "front" / f"{recipe.name}.yaml")
    unseen = texts_of(model, windows_of(model, "validation", arguments), arguments)
    log = folder / "validation.jsonl"
    rows = validated_rows(model, recipes, unseen, asked, known=known, log=log)
    write_json(rows, folder / "front.json")
    write_text(
        "\n".join(report(found, table(rows, list(texts)), arguments)) + "\n", folder / "front.md"
    )
    pareto_picture(
        rows,
        folder / "front.png",
        across=("text_kl", "KL on text that goes on, nats per token"),
        upwards=("recall_kl", "KL on recall, nats per token"),
    )
    print((folder / "front.md").read_text())


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--space", default="attention", help="name or file")
    parser.add_argument("--kept", type=float, default=0.25, help="share of keys")
    parser.add_argument("--candidates", type=int, default=200, help="whose KL is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=6, help="that the cheap rung looks at")
    parser.add_argument("--windows", type=int, default=6, help="of each split")
    parser.add_argument("--prompt", type=int, default=768, help="tokens of a prompt")
    parser.add_argument("--following", type=int, default=256, help="tokens behind it")
    parser.add_argument("--repeated", type=int, default=192, help="tokens that come again")
    parser.add_argument("--skipped", type=int, default=16, help="of these, that are only given")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=Path("runs/attention"))
    return parser.parse_args()


def windows_of(model: LanguageModel, split: str, arguments: argparse.Namespace) -> Tensor:
    """Token ids [count, length] of one split."""
    length = arguments.prompt + arguments.following
    text = load_text(arguments.text)
    return windows(text, split, model, length=length, count=arguments.windows)


def texts_of(model: LanguageModel, every: Tensor, arguments: argparse.Namespace) -> Texts:
    """Windows that go on as they are, and beginnings that come again behind other windows."""
    again = recall_windows(
        every, prompt=arguments.prompt, repeated=arguments.repeated, language_model=model
    )
    return {
        "text": read_densely(model, every, prompt=arguments.prompt),
        "recall": read_densely(model, again, prompt=arguments.prompt, skipped=arguments.skipped),
    }


def tell(tried: Tried) -> None:
    """Say what was measured."""
    if tried.kl:
        kls = " ".join(f"{name} {value:.4f}" for name, value in tried.kl.items())
        print(f"{tried.slot} {tried.origin} {kls} {tried.recipe.criterion.text}", flush=True)


def report(found: Found, lines: list[str], arguments: argparse.Namespace) -> list[str]:
    """What was searched, how far the cheap rung can be trusted, and the table."""
    taus = ", ".join(f"{text} {found.rung_tau(text):.2f}" for text in ("text", "recall"))
    return [
        f"# Criteria that keep {arguments.kept:.0%} of a prompt's keys",
        "",
        f"Made by `python benchmarks/attention_search.py` of model {arguments.model}, search space "
        f"{arguments.space}, seed {arguments.seed}: {found.proposed} recipes drawn, "
        f"{len(found.tried)} that keep keys of their own, {len(found.measured)} measured on "
        f"{arguments.windows} windows of search text. Kendall's tau between attention lost and KL: "
        f"{taus}. The table is of {arguments.windows} windows of validation text, KL in nats per "
        "token; rank 0 is dominated by none, and what the search found is bold.",
        "",
        *lines,
    ]


if __name__ == "__main__":
    main()
