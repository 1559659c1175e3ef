"""How much quicker is a model without the units that went? Tokens per second, measured in turns.

    python benchmarks/speed.py --recipe mask_fisher --shares 0.2,0.3
    python benchmarks/speed.py --node FOLDER     # in llama.cpp too: FOLDER holds node_modules with
                                                 # the npm package node-llama-cpp
    python benchmarks/speed.py --report          # only the table anew

The dense model and the pruned one take turns in one run, so what is told are ratios: of tokens that
are read at once, a window of them, and of tokens that are written one by one behind it. In torch
both are measured in memory, in llama.cpp from GGUF files that were written by `prune --gguf`. Rows
are kept in docs/results/speed.jsonl, docs/results/speed.md is the table. Nothing else may run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from pruning import cpu_name
from rows import append, read

from prunezero.models.editing.selection import Selection
from prunezero.models.loading.gguf import gguf_file_of
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.saving.gguf_deci import write_deci
from prunezero.models.saving.save import save_model
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import check_recipe, dense_sums
from prunezero.pruning.speed import Speed, speed_beside
from prunezero.pruning.testbed import Settings, Testbed, set_up

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
# Tokens that are written by each turn in llama.cpp.
WRITTEN = 32
_PROGRAM = """
import {pathToFileURL} from "url";
const [package_, threads, turns, written, ids, ...files] = process.argv.slice(2);
const {getLlama} = await import(pathToFileURL(package_ + "/dist/index.js"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const read = JSON.parse(ids), taken = files.map(() => []), contexts = [];
for (const modelPath of files) {
  const model = await llama.loadModel({modelPath});
  contexts.push(await model.createContext({contextSize: 1024, threads: Number(threads)}));
}
for (let turn = 0; turn <= Number(turns); turn++) {
  for (const [place, context] of contexts.entries()) {
    const sequence = context.getSequence();
    const begin = performance.now();
    let first = 0, count = 0;
    for await (const token of sequence.evaluate(read, {temperature: 0, yieldEogToken: true})) {
      if (count++ == 0) first = performance.now();
      if (count > Number(written)) break;
    }
    const end = performance.now();
    if (turn > 0) taken[place].push([(first - begin) / 1000, (end - first) / 1000]);
    await sequence.dispose();
  }
}
console.log(JSON.stringify(taken));
process.exit(0);
"""

Row = dict[str, Any]


def main() -> None:
    """Measure each share, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipe", default="mask_fisher")
    parser.add_argument("--shares", default="0.3", help="by commas")
    parser.add_argument("--length", type=int, default=256, help="tokens that are read")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--node", type=Path, help="folder of node_modules, for llama.cpp")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    path = RESULTS / "speed.jsonl"
    if not arguments.report:
        torch.set_num_threads(arguments.threads)
        settings = Settings(sequence_length=arguments.length, calibration_tokens=8192)
        for share in map(float, arguments.shares.split(",")):
            testbed = set_up(arguments.model, "demo", settings, dtype="float32")
            for row in measured(arguments, testbed, share):
                append(path, row)
    text = "\n".join(report(read(path)))
    path.with_suffix(".md").write_text(text + "\n")
    print(text)


def measured(arguments: argparse.Namespace, testbed: Testbed, share: float) -> list[Row]:
    """The rows of one share, in torch and, where it is there, in llama.cpp."""
    recipe, language_model = Recipe.load(arguments.recipe), testbed.language_model
    layers = check_recipe(language_model, recipe, share)
    sums = testbed.statistics(layers, dense_sums([recipe]))
    ids = testbed.windows("test")[:1]
    head = {
        "model": arguments.model,
        "recipe": recipe.name,
        "share": share,
        "length": arguments.length,
        "threads": arguments.threads,
        "cpu": cpu_name(),
    }
    with tempfile.TemporaryDirectory(prefix="speed-") as name:
        files = [Path(name) / "dense.gguf", Path(name) / "pruned.gguf"]
        if arguments.node is not None:
            write_gguf(language_model, Selection(), files[0])
        outcome = prune(
            language_model,
            recipe,
            share,
            statistics=sums,
            windows=testbed.windows("calibration"),
        )
        rows = [
            head
            | {"engine": "torch"}
            | columns(*speed_beside(language_model, outcome.selection, ids, turns=arguments.turns))
        ]
        if arguments.node is not None:
            write_gguf(language_model, outcome.selection, files[1])
            speeds = in_llama_cpp(arguments, ids[0].tolist(), files, Path(name))
            rows.append(head | {"engine": "llama.cpp"} | columns(*speeds))
    return rows


def write_gguf(language_model: LanguageModel, selection: Selection, path: Path) -> None:
    """Write the model without the units that go as a file for llama.cpp."""
    folder = path.with_suffix("")
    save_model(language_model, folder, smaller=selection)
    write_deci(folder, path, language_model.tokenizer, gguf_file_of(language_model.name))


def in_llama_cpp(
    arguments: argparse.Namespace, ids: list[int], files: list[Path], scratch: Path
) -> tuple[Speed, Speed]:
    """Tokens per second of two files, in turns."""
    program = scratch / "speed.mjs"
    program.write_text(_PROGRAM)
    package = arguments.node.absolute() / "node_modules" / "node-llama-cpp"
    numbers = [str(package), str(arguments.threads), str(arguments.turns), str(WRITTEN)]
    words = ["node", str(program), *numbers, json.dumps(ids), *map(str, files)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    dense, pruned = json.loads(done.stdout.strip().splitlines()[-1])
    return speed_of(dense, len(ids)), speed_of(pruned, len(ids))


def speed_of(taken: list[list[float]], length: int) -> Speed:
    """Medians over turns of seconds of reading and of writing."""
    read_, written = (statistics.median(one) for one in zip(*taken, strict=True))
    return Speed(length / read_, WRITTEN / written)


def columns(dense: Speed, pruned: Speed) -> Row:
    """Both as columns of a row."""
    return {
        "dense_read": dense.read,
        "dense_written": dense.written,
        "pruned_read": pruned.read,
        "pruned_written": pruned.written,
    }


def report(rows: list[Row]) -> list[str]:
    """The table as Markdown; of equal conditions the last row counts."""
    lines = [
        "# Speed without the units that went",
        "",
        "Made by `python benchmarks/speed.py`: float32, dense and pruned in turns, medians. The "
        "share is of the parameters of all blocks.",
        "",
        "| engine | model | recipe | share | read, tokens/s dense | pruned | ratio | written, "
        "tokens/s dense | pruned | ratio | threads, processor |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = ("engine", "model", "recipe", "share", "length", "threads", "cpu")
    for row in {tuple(row[key] for key in keys): row for row in rows}.values():
        cells = [row["engine"], row["model"], f"`{row['recipe']}`", f"{100 * row['share']:g} %"]
        for kind in ("read", "written"):
            dense, pruned = row[f"dense_{kind}"], row[f"pruned_{kind}"]
            cells += [f"{dense:,.0f}", f"{pruned:,.0f}", f"{pruned / dense:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{row['threads']}, {row['cpu']}"]) + " |")
    return lines


if __name__ == "__main__":
    main()
