"""How many seconds and how much memory do screening and pruning take on a model of 7B weights?

    python benchmarks/large.py --json large.jsonl
    python benchmarks/large.py --device cpu --blocks 2 --width 64 --length 32 --windows 4

A random Llama of the sizes of Llama 2 7B is built on the device, calibrated on random ids, asked
for the layer errors of formulas, and pruned by one recipe after the other, dense again between
them. Every step is a line of JSON: its seconds, and the most memory of the device that it took. A
step that fails or for which memory is short says so, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rows import append
from seconds_and_memory import MIB, forget_peak, peak_mib

from prunezero.errors import PruneZeroError
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.editing.zeroing import DenseWeights
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import dense_sums
from prunezero.scoring.statistics import Statistics
from prunezero.searching.proxies.layer_error import layer_error, masks_on
from prunezero.searching.proxies.samples import rung_sums, sample_rows, stacked
from prunezero.searching.spaces.space import SearchSpace
from prunezero.searching.strategies.genetics import random_criterion

FOUND = Path(__file__).resolve().parent.parent / "docs" / "results" / "found" / "found-50.yaml"
RECIPES = ("wanda", "sparsegpt", str(FOUND))
# Sizes of the 7B model, which a smaller width makes smaller together.
HEAD, HIDDEN, INSIDE = 128, 4096, 11008

Row = dict[str, Any]


def main() -> None:
    """Run every step, and print its line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=usual)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--width", type=int, default=HIDDEN)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--formulas", type=int, default=16, help="that are screened")
    parser.add_argument("--signals", default="activations", help="the costliest of them")
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)

    def step(name: str, run: Callable[[], Any], **about: Any) -> Any:
        return timed(name, run, device, arguments, about)

    model = step("build", lambda: random_model(arguments, device))
    if model is None:
        raise SystemExit("the model does not fit the device; give fewer --blocks or less --width")
    drawn = torch.Generator().manual_seed(0)
    words = model.model.config.vocab_size
    ids = torch.randint(words, (arguments.windows, arguments.length), generator=drawn)
    layers = find_linears(model.model)
    screened(model, layers, ids, step, arguments)
    dense = step("keep dense weights", lambda: DenseWeights(layers))
    for name in arguments.recipes:
        recipe = Recipe.load(name)
        pruned(model, recipe, layers, ids, step, arguments.sparsity, dense)


def timed(
    name: str,
    run: Callable[[], Any],
    device: torch.device,
    arguments: argparse.Namespace,
    about: Row,
) -> Any:
    """The result of a step, or None where memory was short; its line is printed and kept."""
    forget_peak()
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    begin, result, row = time.perf_counter(), None, {"step": name, **about}
    try:
        result = run()
        if is_gpu:
            torch.cuda.synchronize(device)
    except (torch.OutOfMemoryError, PruneZeroError) as error:
        row["fault"] = str(error).splitlines()[0]
    row["seconds"] = time.perf_counter() - begin
    row["peak_mib"] = torch.cuda.max_memory_allocated(device) / MIB if is_gpu else peak_mib()
    row |= {"device": torch.cuda.get_device_name(device) if is_gpu else "cpu"}
    row |= {"blocks": arguments.blocks, "width": arguments.width}
    row |= {"tokens": arguments.windows * arguments.length}
    print(json.dumps(row), flush=True)
    if arguments.json:
        append(arguments.json, row)
    return result


def random_model(arguments: argparse.Namespace, device: torch.device) -> LanguageModel:
    """A random Llama of 7B sizes, or of as many blocks and as much width as were asked for."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    width = arguments.width
    heads = max(1, width // HEAD)
    configuration = LlamaConfig(
        num_hidden_layers=arguments.blocks,
        hidden_size=width,
        intermediate_size=INSIDE * width // HIDDEN,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=32000 if width == HIDDEN else 512,
        max_position_embeddings=max(4096, arguments.length),
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        network = AutoModelForCausalLM.from_config(configuration, dtype=dtype).eval()
    network.requires_grad_(False)
    return LanguageModel(network, None, "random", "", dtype, device)


def screened(
    model: LanguageModel,
    layers: list[Linear],
    ids: torch.Tensor,
    step: Callable[..., Any],
    arguments: argparse.Namespace,
) -> None:
    """Calibrate for a search space, sample rows, and ask for layer errors of random formulas."""
    space = SearchSpace.load("formulas", signals=arguments.signals)
    sums = rung_sums(space.features, with_gradients=False)
    statistics = step("calibrate for screening", lambda: calibrate(model, ids, layers, sums))
    if statistics is None:
        return
    samples = step("sample rows", lambda: stacked(sample_rows(layers, statistics, space.features)))
    if samples is None:
        return
    rng = random.Random(0)
    proposed = (random_criterion(space, rng) for _ in range(50 * arguments.formulas))
    criteria = [one for one in proposed if one is not None][: arguments.formulas]
    usual = Recipe.load("wanda")

    def errors() -> list[float]:
        found = []
        for criterion in criteria:
            recipe = usual.model_copy(update={"criterion": criterion})
            found.append(
                layer_error(samples, masks_on(samples, recipe, arguments.sparsity, "free"))
            )
        return found

    step("screen", errors, formulas=len(criteria))


def pruned(
    model: LanguageModel,
    recipe: Recipe,
    layers: list[Linear],
    ids: torch.Tensor,
    step: Callable[..., Any],
    sparsity: float,
    dense: DenseWeights | None,
) -> None:
    """Collect what a recipe looks at, prune by it, and make the model dense again."""
    sums = dense_sums([recipe])
    statistics: dict[str, Statistics] | None = step(
        "calibrate", lambda: calibrate(model, ids, layers, sums), recipe=recipe.name
    )
    if statistics is None or dense is None:
        return
    with dense:
        step(
            "prune",
            lambda: prune(model, recipe, sparsity, statistics=statistics, windows=ids),
            recipe=recipe.name,
        )


if __name__ == "__main__":
    main()
