"""Where does a model lose when its residual stream is cut to fewer directions, as SliceGPT does?

    python benchmarks/stream_cuts.py            # 10 minutes on one core
    python benchmarks/stream_cuts.py --report   # only the table anew

SliceGPT costs the demo model far more than anything that was published of it. This is its equations
once more, apart from the engine: in front of each attention and MLP the stream is projected on the
eigenvectors of its normalised states that stay, one place after the other, each on what the places
before it left. Then the cuts are made at some places alone, which says where the loss comes from.
Rows are kept in docs/results/stream_cuts.jsonl, docs/results/stream_cuts.md is the table.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from conditions import add_conditions, settings_of
from pruning import cpu_name
from rows import append, read, under_equal
from torch import Tensor
from torch.nn.functional import cross_entropy

from prunezero.pruning.testbed import set_up

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
CONDITIONS = ("model", "text", "sequence_length", "calibration_tokens", "evaluation_tokens")

Row = dict[str, Any]


class Stream:
    """The residual stream of a Llama-like model, which may be cut in front of each sub-block."""

    def __init__(self, model: Any) -> None:
        self.body, self.head = model.model, model.lm_head
        self.width: int = model.config.hidden_size
        self.places = 2 * len(self.body.layers)

    def sub_block(self, place: int, states: Tensor) -> Tensor:
        """What an attention (even places) or an MLP (odd) adds to states [1, tokens, width]."""
        block = self.body.layers[place // 2]
        if place % 2:
            return block.mlp(block.post_attention_layernorm(states))
        length = states.shape[1]
        rotations = self.body.rotary_emb(states, torch.arange(length)[None])
        future = torch.full((1, 1, length, length), float("-inf")).triu(1)
        normed = block.input_layernorm(states)
        return block.self_attn(normed, position_embeddings=rotations, attention_mask=future)[0]

    def normalised(self, states: Tensor) -> Tensor:
        """States as a norm without weights leaves them."""
        return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True))

    @torch.no_grad()
    def cuts(self, windows: Tensor, kept: float) -> tuple[list[Tensor], list[float]]:
        """Projections [width, width] of all places, and the share of energy that each loses."""
        streams = [self.body.embed_tokens(window[None]) for window in windows]
        cuts, lost = [], []
        for place in range(self.places):
            normed = torch.cat([self.normalised(states)[0] for states in streams]).double()
            energies, directions = torch.linalg.eigh(normed.T @ normed)
            staying = directions[:, -round(kept * self.width) :]
            lost.append(float(1 - energies[-staying.shape[1] :].sum() / energies.sum()))
            cuts.append((staying @ staying.T).float())
            streams = [states @ cuts[-1] for states in streams]
            streams = [states + self.sub_block(place, states) for states in streams]
        return cuts, lost

    @torch.no_grad()
    def perplexity(self, windows: Tensor, cuts: dict[int, Tensor]) -> float:
        """Perplexity of windows [count, length] when the stream is cut at these places."""
        losses = []
        for window in windows:
            states = self.body.embed_tokens(window[None])
            for place in range(self.places):
                states = states @ cuts[place] if place in cuts else states
                states = states + self.sub_block(place, states)
            logits = self.head(self.body.norm(states))[0]
            losses.append(float(cross_entropy(logits[:-1], window[1:])))
        return math.exp(sum(losses) / len(losses))


def main() -> None:
    """Measure each share, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--shares", default="0.1,0.2", help="of directions that go, by commas")
    add_conditions(parser, calibration_tokens=4096, evaluation_tokens=2048)
    arguments = parser.parse_args()
    path = RESULTS / "stream_cuts.jsonl"
    if not arguments.report:
        torch.set_num_threads(arguments.threads)
        testbed = set_up(
            arguments.model, arguments.text, settings_of(arguments, 0), dtype="float32"
        )
        stream = Stream(testbed.language_model.model)
        head = {key: getattr(arguments, key) for key in (*CONDITIONS, "threads")}
        for share in map(float, arguments.shares.split(",")):
            cuts, lost = stream.cuts(testbed.windows("calibration"), 1 - share)
            for where, places in groups(stream.places):
                found = stream.perplexity(
                    testbed.windows("validation"), {place: cuts[place] for place in places}
                )
                energy = max([lost[place] for place in places], default=0.0)
                row = {"where": where, "cuts": len(places), "share": share, "lost": energy}
                append(path, row | {"perplexity": found, "cpu": cpu_name()} | head)
                print(share, where, f"{found:.2f}", flush=True)
    text = "\n".join(report(read(path)))
    path.with_suffix(".md").write_text(text + "\n")
    print(text)


def groups(places: int) -> Iterator[tuple[str, range]]:
    """Which places are cut together."""
    third = places // 3
    yield "nowhere", range(0)
    yield "everywhere", range(places)
    yield "the first block", range(2)
    yield "the rest of the first third", range(2, third)
    yield "the second third", range(third, 2 * third)
    yield "the last third", range(2 * third, places)
    yield "one place in the middle", range(places // 2, places // 2 + 1)


def report(rows: list[Row]) -> list[str]:
    """The tables as Markdown; of equal conditions the last row counts."""
    lines = [
        "# Cuts of the residual stream",
        "",
        "Made by `python benchmarks/stream_cuts.py`: SliceGPT's equations apart from the engine, "
        "with cuts at some places alone. Energy is that of the normalised states; the largest of "
        "the places that are cut.",
        "",
    ]
    for found in under_equal(rows, CONDITIONS):
        one = found[0]
        lines += [
            f"## {one['model']}, float32, windows of {one['sequence_length']} tokens",
            "",
            f"{one['calibration_tokens']:,} calibration and {one['evaluation_tokens']:,} "
            f"validation tokens of {one['text']} text, draw 0.",
            "",
            "| directions that go | cut | places | energy lost at one, at most | validation |",
            "|---|---|---|---|---|",
        ]
        for row in {(row["share"], row["where"]): row for row in found}.values():
            lines.append(
                f"| {100 * row['share']:g} % | {row['where']} | {row['cuts']} | "
                f"{100 * row['lost']:.2f} % | {row['perplexity']:.2f} |"
            )
        lines.append("")
    return lines[:-1]


if __name__ == "__main__":
    main()
