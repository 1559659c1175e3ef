"""What does a window cost beside the blocks, and how many windows does a search need?

    python benchmarks/windows.py             # seconds, on a random model of the demo model's shape
    python benchmarks/windows.py --replay    # early stop, on windows that were measured once
    python benchmarks/windows.py --report    # only the page anew

The first sets what is made of logits tile by tile against the same in plain torch, over all tokens
of a window at once; they take turns in one process, and their bits are compared. Beside them stand
the blocks and the head. The second draws searches from docs/results/found.jsonl: the recipes that
were measured under equal conditions, in random order and four at a time, of which each has to
reach the best or the third so far. Rows are kept in docs/results/windows.jsonl, and
docs/results/windows.md is the page.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pruning import cpu_name
from rows import append, read, under_equal
from torch import Tensor

from prunezero.models.evaluation import window_measures
from prunezero.searching.evaluation.early_stop import windows_needed
from prunezero.searching.evaluation.promotion import FINALISTS

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
# Recipes stand under equal conditions where these are the same.
CONDITIONS = ("model", "sparsity", "pattern", "seed")
FEWEST_RECIPES = 8
# Candidates of one generation that are measured, and draws of their order.
AT_ONCE, ORDERS = 4, 6
AGREEMENT_AMONG = (1, 5)
TILED = "tiled"

Row = dict[str, Any]


def main() -> None:
    """Measure or replay, then write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--blocks", type=int, default=30, help="that are reckoned with")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--replay", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--lines", type=Path, default=RESULTS / "windows.jsonl")
    arguments = parser.parse_args()
    if arguments.replay:
        found = replayed(read(RESULTS / "found.jsonl"))
    elif arguments.report:
        found = iter(())
    else:
        torch.set_num_threads(arguments.threads)
        found = measured(arguments)
    for row in found:
        append(arguments.lines, row)
    text = "\n".join(report(read(arguments.lines)))
    arguments.lines.with_suffix(".md").write_text(text + "\n")
    print(text)


@torch.no_grad()
def measured(arguments: argparse.Namespace) -> Iterator[Row]:
    """Milliseconds of each part of one window, by dtype."""
    few = 2
    of_blocks = arguments.blocks / few
    share = {"blocks": of_blocks, "blocks, four windows": of_blocks / 4}
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(arguments.vocabulary, few).to(dtype)
        results, seconds = in_turns(calls_on(model, arguments.length), arguments.repeats)
        for name, taken in seconds.items():
            what, _, how = name.partition(", ")
            plain = f"{what}, at once"
            row = {
                "kind": "part",
                "dtype": str(dtype).removeprefix("torch."),
                "part": name,
                "milliseconds": 1000 * share.get(name, 1.0) * statistics.median(taken),
                "length": arguments.length,
                "vocabulary": arguments.vocabulary,
                "blocks": arguments.blocks,
                "threads": arguments.threads,
                "cpu": cpu_name(),
            }
            yield row | ({"is_same": results[plain] == results[name]} if how == TILED else {})


def in_turns(
    calls: dict[str, Callable[[int], Any]], repeats: int
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """What each returns, and its processor seconds in every turn, which other work changes less."""
    results = {name: call(0) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name, call in calls.items():
            begin = time.process_time()
            call(turn)
            seconds[name].append(time.process_time() - begin)
    return results, seconds


def calls_on(model: Any, length: int) -> dict[str, Callable[[int], Any]]:
    """What takes turns: measures of one window's logits in both ways, the head and the blocks."""
    vocabulary, width = model.lm_head.weight.shape
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (4, length), generator=drawn)
    states = torch.randn(length, width, generator=drawn).to(model.dtype)
    dense = 4 * model.lm_head(states)
    pruned = (dense.float() + torch.randn(dense.shape, generator=drawn) / 2).to(model.dtype)

    def as_they_are(logits: Tensor) -> Tensor:
        return logits

    nears = {"loss": None, "loss and distance": dense.__getitem__}
    found: dict[str, Callable[[int], Any]] = {}
    for what, near in nears.items():
        found[f"{what}, at once"] = partial(_called, at_once, pruned, near, ids[0])
        tiled = partial(window_measures, as_they_are)
        found[f"{what}, {TILED}"] = partial(_called, tiled, pruned, near, ids[0])
    return found | {
        "head": partial(_called, model.lm_head, states),
        "blocks": partial(_called, model.model, ids[:1]),
        "blocks, four windows": partial(_called, model.model, ids),
    }


def _called(call: Callable[..., Any], *given: Any) -> Any:
    """The result, whichever turn it is, which stands last."""
    return call(*given[:-1])


def random_model(vocabulary: int, blocks: int) -> Any:
    """A random Llama with blocks like those of SmolLM2-135M."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    configuration = LlamaConfig(
        vocab_size=vocabulary, num_hidden_layers=blocks, num_key_value_heads=3, **sizes
    )
    return LlamaForCausalLM(configuration).eval()


def at_once(
    pruned: Tensor, dense: Callable[[slice], Tensor] | None, ids: Tensor
) -> tuple[float, tuple[float, ...]]:
    """As `window_measures`, by plain torch over all tokens at once."""
    places = slice(0, len(ids) - 1)
    q = pruned[places].float().log_softmax(-1)
    loss = -q.gather(1, ids[1:, None]).sum(dtype=torch.float64)
    near = [0.0] * 4
    if dense is not None:
        p = dense(places).float().log_softmax(-1)
        ahead = likelier(q, p.argmax(-1, keepdim=True))
        found = [
            (p.exp() * (p - q)).sum(-1),
            *((ahead < count).double() for count in AGREEMENT_AMONG),
            1 - (p.exp() - q.exp()).clamp(min=0).sum(-1).double(),
        ]
        near = [float(values.sum(dtype=torch.float64)) for values in found]
    count = len(ids) - 1
    return float(loss) / count, tuple(value / count for value in near)


def likelier(q: Tensor, choice: Tensor) -> Tensor:
    """How many words are likelier than one of each row, as far as it matters; ties to the first."""
    own = q.gather(1, choice)
    top = q.topk(max(AGREEMENT_AMONG)).values
    ahead = (top > own).sum(-1)
    tied = (top == own).sum(-1).gt(1) | (top[:, -1] == own[:, 0])
    before = torch.arange(q.shape[-1]) < choice[tied]
    ahead[tied] += ((q[tied] == own[tied]) & before).sum(-1)
    return ahead


def replayed(rows: list[Row]) -> Iterator[Row]:
    """How many windows early stop spares, and whether it changes what is found."""
    together = [some for some in under_equal(rows, CONDITIONS) if len(some) >= FEWEST_RECIPES]
    for split in ("validation", "test"):
        for place in (1, FINALISTS):
            total = looked_at = stops = changed = 0
            for some in together:
                losses = [row["window_losses"][split] for row in some]
                for order in range(ORDERS):
                    drawn = losses.copy()
                    random.Random(order).shuffle(drawn)
                    needed, reached = one_search(drawn, place)
                    total += len(losses) * len(losses[0])
                    looked_at += sum(needed)
                    stops += sum(count < len(losses[0]) for count in needed)
                    best = sorted(map(statistics.fmean, losses))
                    changed += reached[:place] != best[:place]
            yield {
                "kind": "replay",
                "windows_of_text": len(losses[0]),
                "place": place,
                "searches": ORDERS * len(together),
                "candidates_stopped": stops,
                "windows": total,
                "looked_at": looked_at,
                "changed": changed,
            }


def one_search(drawn: list[list[float]], place: int) -> tuple[list[int], list[float]]:
    """Of each candidate how many windows are looked at, and the means of those seen whole."""
    needed: list[int] = []
    whole: list[tuple[float, list[float]]] = []
    for start in range(0, len(drawn), AT_ONCE):
        some = drawn[start : start + AT_ONCE]
        rival = sorted(whole)[place - 1][1] if len(whole) >= place else []
        counts = [windows_needed(losses, rival) if rival else len(losses) for losses in some]
        needed += counts
        whole += [
            (statistics.fmean(losses), losses)
            for losses, count in zip(some, counts, strict=True)
            if count == len(losses)
        ]
    return needed, sorted(mean for mean, _ in whole)


def report(rows: list[Row]) -> list[str]:
    """The page; of equal conditions the last row counts."""
    lines = [
        "# Windows",
        "",
        "## What one costs",
        "",
        "Made by `python benchmarks/windows.py`: a random model of the demo model's shape, one "
        "window, medians of processor time over turns in one process. What is made of logits is "
        "set against plain torch over all tokens at once.",
        "",
        "| part | dtype | milliseconds | at once | ratio | same bits | tokens, words, threads, "
        "processor |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = ("dtype", "part", "length", "vocabulary", "blocks", "threads", "cpu")
    parts = [row for row in rows if row["kind"] == "part"]
    latest = {tuple(row[key] for key in keys): row for row in parts}
    for row in latest.values():
        lines += _part(row, latest, keys)
    lines += [
        "",
        "## How many a search needs",
        "",
        "Made by `python benchmarks/windows.py --replay`: candidates are the recipes of "
        "`found.jsonl` that were measured under equal conditions, in random order, four at a "
        "time. Each is left alone once a paired t-test says that it is worse than the best, or "
        "the third, of those before (`prunezero/searching/evaluation/early_stop.py`).",
        "",
        "| windows of the text | to reach | searches | candidates stopped | windows spared | "
        "searches whose best changed |",
        "|---|---|---|---|---|---|",
    ]
    replays = [row for row in rows if row["kind"] == "replay"]
    for row in {(one["windows_of_text"], one["place"]): one for one in replays}.values():
        whom = "the best" if row["place"] == 1 else f"the best {row['place']}"
        spared = 1 - row["looked_at"] / row["windows"]
        lines.append(
            f"| {row['windows_of_text']} | {whom} | {row['searches']} | "
            f"{row['candidates_stopped']} | {100 * spared:.0f} % | {row['changed']} |"
        )
    return lines


def _part(row: Row, latest: dict[tuple[Any, ...], Row], keys: tuple[str, ...]) -> list[str]:
    what, _, how = row["part"].partition(", ")
    if how == "at once":
        return []
    name, cells = row["part"], ["", "", ""]
    if how == TILED:
        plain = latest[tuple({**row, "part": f"{what}, at once"}[key] for key in keys)]
        name, ratio = what, plain["milliseconds"] / row["milliseconds"]
        cells = [f"{plain['milliseconds']:.0f}", f"{ratio:.1f}", "no yes".split()[row["is_same"]]]
    elif what == "blocks":
        name = f"{row['blocks']} {name}" + (", of each" if how else "")
    where = f"{row['length']}, {row['vocabulary']:,}, {row['threads']}, {row['cpu']}"
    told = [name, row["dtype"], f"{row['milliseconds']:.0f}", *cells, where]
    return ["| " + " | ".join(told) + " |"]


if __name__ == "__main__":
    main()
