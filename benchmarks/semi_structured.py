"""How much faster is a 2:4 model than a dense one, on a GPU with sparse tensor cores?

    python benchmarks/semi_structured.py --tokens 1 256 2048 --json speed.json

Times each layer shape alone, then the whole model, dense and as torch's 2:4 tensors, in bfloat16.
Both hold the same zeros and are timed in turn within one run, every second time the other way
round; a speed-up is the ratio of the medians. What Python spends on a call counts, as it does for
a user who compiles nothing. On any other machine it says what is missing, and ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.editing.semi_structured import check_gpu, to_semi_structured
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.loading.load import load_model
from prunezero.scoring.selection import select

# Calls between two events, so that one is long enough for the clock.
CALLS = 10
WARM_UPS = 3

Row = dict[str, str | int | float]


def main() -> None:
    """Measure, print one line per shape and model, and write all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=["demo", "7b"], default=["demo", "7b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 256, 2048])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=32, help="of the random 7b model")
    parser.add_argument("--json", type=Path, default=Path("semi_structured.json"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        check_gpu(device)
    except ModelError as error:
        print(f"nothing is measured: {error}")
        return
    rows: list[Row] = []
    with torch.no_grad():
        for name in arguments.models:
            model = demo(device) if name == "demo" else random_7b(device, arguments.blocks)
            for row in measured(model, arguments.tokens, arguments.repeats):
                rows.append(row)
                print(line(row), flush=True)
    found = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "rows": rows}
    arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def demo(device: torch.device) -> LanguageModel:
    """The demo model."""
    return load_model("demo", dtype="bfloat16", device=str(device))


def random_7b(device: torch.device, blocks: int) -> LanguageModel:
    """A random model of the sizes of Llama 2 7B: speed does not depend on what weights say."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    # The usual LlamaConfig is the 7B model.
    configuration = LlamaConfig(num_hidden_layers=blocks)
    with device:
        network = AutoModelForCausalLM.from_config(configuration, dtype=torch.bfloat16).eval()
    return LanguageModel(network, None, "7b", "", torch.bfloat16, device)


def measured(model: LanguageModel, tokens: list[int], repeats: int) -> list[Row]:
    """One row per shape and count of tokens, then one per count for the whole model."""
    layers = find_linears(model.model)
    for layer in layers:
        layer.weight.masked_fill_(~select(layer.weight.abs(), 0.5, pattern="2:4"), 0.0)
    dense = [layer.module.weight for layer in layers]
    to_semi_structured(model, layers)
    sparse = [layer.module.weight for layer in layers]
    rows = []
    one_per_shape = {tuple(layer.weight.shape): place for place, layer in enumerate(layers)}
    for (height, width), place in one_per_shape.items():
        weights = [[dense[place]], [sparse[place]]]
        what = f"{model.name} {layers[place].kind} {height} x {width}"
        for count in tokens:
            inputs = torch.randn(1, count, width, dtype=model.dtype, device=model.device)
            call = layers[place].module
            rows.append(row_of(what, [layers[place]], weights, call, inputs, repeats))
    for count in tokens:
        words = model.model.config.vocab_size
        ids = torch.randint(words, (1, count), device=model.device)
        what = f"{model.name} whole model"
        rows.append(row_of(what, layers, [dense, sparse], model.model, ids, repeats))
    return rows


def row_of(
    what: str,
    layers: list[Linear],
    weights: list[list[Any]],
    call: Callable[[Tensor], Any],
    inputs: Tensor,
    repeats: int,
) -> Row:
    """Medians of dense and 2:4, and how far their outputs are apart."""
    times: list[list[float]] = [[], []]
    outputs: list[Tensor] = []
    for kind in (0, 1):
        put(layers, weights[kind])
        for _ in range(WARM_UPS):
            output = call(inputs)
        # A layer answers with a tensor, a model with logits and more.
        outputs.append(getattr(output, "logits", output).float())
    for repeat in range(repeats):
        for kind in (0, 1) if repeat % 2 == 0 else (1, 0):
            put(layers, weights[kind])
            times[kind].append(milliseconds(call, inputs))
    dense, sparse = map(statistics.median, times)
    orders = [
        statistics.median(times[0][start::2]) / statistics.median(times[1][start::2])
        for start in (0, 1)
        if repeats > 1
    ]
    return {
        "what": what,
        "tokens": inputs.shape[1],
        "dense_milliseconds": dense,
        "sparse_milliseconds": sparse,
        "speed_up": dense / sparse,
        "lower_of_both_orders": min(orders, default=dense / sparse),
        "higher_of_both_orders": max(orders, default=dense / sparse),
        "relative_difference": float((outputs[1] - outputs[0]).norm() / outputs[0].norm()),
    }


def put(layers: list[Linear], weights: list[nn.Parameter]) -> None:
    """Give the layers these weights."""
    for layer, weight in zip(layers, weights, strict=True):
        layer.module.weight = weight


def milliseconds(call: Callable[[Tensor], Any], inputs: Tensor) -> float:
    """One call, as the GPU's own clock has it."""
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    begin.record()
    for _ in range(CALLS):
        call(inputs)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / CALLS


def line(row: Row) -> str:
    """One row for reading."""
    times = f"{row['dense_milliseconds']:9.3f} ms dense {row['sparse_milliseconds']:9.3f} ms 2:4"
    spread = f"{row['lower_of_both_orders']:.2f} to {row['higher_of_both_orders']:.2f}"
    return (
        f"{row['what']:32} {row['tokens']:5} tokens {times} {row['speed_up']:5.2f} x "
        f"({spread} by order; outputs differ by {row['relative_difference']:.1e})"
    )


if __name__ == "__main__":
    main()
