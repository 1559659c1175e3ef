"""A page for units takes out what it zeroes, says what it cannot do, and holds no idle part."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prunezero.errors import OutputError
from prunezero.models.loading.load import load_model
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import check_recipe, dense_sums
from prunezero.pruning.testbed import with_choices
from prunezero.report.export.page import no_page, pruner_page, write_pruner
from prunezero.report.export.page_folding import folded
from tests.tiny_models import LAYOUTS, save_tiny_model, tiny_batches, tiny_network

BATCHES = torch.split(tiny_batches(3, 12), 1)
IDS = tiny_batches(1, 9, seed=5)


def recipe_of(unit: Any = "width", criterion: str = "A*row_mean(abs(W))", **fields: Any) -> Recipe:
    known = {"name": "mine", "criterion": criterion, "compare": "group", "unit": unit, **fields}
    return validated(Recipe, known, "mine.yaml")


def names_of(recipe: Recipe) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(pruner_page(recipe), "<page>", "exec", dont_inherit=True), names)
    return names


def logits(network: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = network(IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", LAYOUTS)
def test_smaller_matrices_compute_what_zeros_do_and_go_on_with_a_text(family: str) -> None:
    page = names_of(recipe_of(compare="model" if family in ("qwen3", "gpt2") else "group"))
    zeros: Any = tiny_network(family)
    smaller: Any = tiny_network(family)
    report = page["prune_"](zeros, BATCHES, 0.5)
    same = page["prune_"](smaller, BATCHES, 0.5, slice=True)
    assert all(torch.equal(report["kept"][name], same["kept"][name]) for name in report["kept"])
    torch.testing.assert_close(logits(smaller), logits(zeros), rtol=1e-4, atol=1e-5)
    sizes = [sum(one.numel() for one in network.parameters()) for network in (zeros, smaller)]
    assert sizes[1] < sizes[0]
    text = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 2}
    assert torch.equal(smaller.generate(IDS, **text), zeros.generate(IDS, **text))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_query_heads_go_and_the_keys_and_values_of_all_stay(family: str) -> None:
    page = names_of(recipe_of("head", "A2"))
    network: Any = tiny_network(family)
    report = page["prune_"](network, BATCHES, 0.5, slice=True)
    # One of the two query heads of each of the two key-value heads.
    for kept in report["kept"].values():
        assert kept.view(2, 2).sum(1).tolist() == [1, 1]
    assert network.config.num_attention_heads == network.config.num_key_value_heads == 2
    again = type(network)(network.config)
    again.load_state_dict(network.state_dict())
    torch.testing.assert_close(logits(again.eval()), logits(network))


def test_neurons_go_by_the_largest_part_of_the_output_that_each_gives() -> None:
    """The score by its equation, in a loop over neurons, tokens and sequences."""
    network: Any = tiny_network("llama")
    mlp = network.model.layers[1].mlp
    seen: list[torch.Tensor] = []
    hook = mlp.down_proj.register_forward_hook(lambda module, args, output: seen.append(args[0][0]))
    with torch.no_grad():
        for ids in BATCHES:
            network(ids, use_cache=False)
    hook.remove()
    values = []
    for neuron in range(64):
        squares = sum(float(x[neuron].double()) ** 2 for one in seen for x in one)
        column = mlp.down_proj.weight.detach()[:, neuron].double().abs()
        values.append((squares / len(seen)) ** 0.5 * float(column.mean()))
    lowest = sorted(range(64), key=lambda neuron: values[neuron])[:16]
    report = names_of(recipe_of("neuron"))["prune_"](network, BATCHES, 0.25)
    gone = ~report["kept"]["model.layers.1.mlp"]
    assert sorted(lowest) == gone.nonzero().flatten().tolist()
    assert not mlp.down_proj.weight[:, gone].any() and not mlp.up_proj.weight[gone].any()


def test_a_layout_whose_heads_are_normed_together_is_refused_by_name() -> None:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 97}
    with torch.random.fork_rng(devices=[]):
        network = Olmo2ForCausalLM(Olmo2Config(**sizes, num_attention_heads=4, pad_token_id=2))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    page = names_of(recipe_of("kv_group"))
    with pytest.raises(page["RefusalError"], match="Olmo2ForCausalLM: something beside its reader"):
        page["prune_"](network, BATCHES, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    # Its neurons are apart.
    assert names_of(recipe_of("neuron"))["prune_"](network, BATCHES, 0.5)["sparsity"] == 0.5


def test_heads_that_are_counted_elsewhere_are_refused_before_anything_changes() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    with torch.random.fork_rng(devices=[]):
        network = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    page = names_of(recipe_of("kv_group", "RND"))
    with pytest.raises(page["RefusalError"], match="BloomForCausalLM cannot be run on smaller"):
        page["prune_"](network.eval(), BATCHES, 0.5, slice=True)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert page["prune_"](network, BATCHES, 0.5)["sparsity"] == 0.5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"unit": {"width": {"rescore": 8}}, "criterion": "Lr0"}, r"unit: width \(rescore 8\)"),
        ({"unit": {"width": {"normalise": "slope"}}}, r"unit: width \(normalise slope\)"),
        ({"unit": "layer", "criterion": "BI", "compare": "model"}, "unit: layer"),
        ({"unit": "channel", "criterion": "A2"}, "unit: channel"),
        ({"schedule": "iterative"}, "schedule: iterative"),
        ({"allocate": "slopes"}, "allocate: slopes"),
        (
            {"unit": {"neuron": {"measure": "milliseconds"}}},
            r"unit: neuron \(measure milliseconds\)",
        ),
        ({"criterion": "A/MS"}, r"criterion: MS \(measured on trial\)"),
        ({"criterion": "A*SLOPE"}, r"criterion: SLOPE \(measured on trial\)"),
        (
            {
                "criterion": "row_sum(abs(G_lora))",
                "schedule": "while_training",
                "recover": "lora",
            },
            r"criterion: G_lora \(known while layers train\), schedule: while_training",
        ),
    ],
)
def test_what_no_page_can_follow_is_refused_in_a_sentence(fields: Any, said: str) -> None:
    with pytest.raises(OutputError, match=f"mine has {said}.*which a one-page pruner cannot"):
        pruner_page(recipe_of(**fields))
    with pytest.raises(OutputError, match="add --statistics dense"):
        pruner_page(recipe_of(statistics="sequential"))


def functions_of(page: str) -> dict[str, ast.stmt]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node for node in ast.parse(page).body if isinstance(node, kinds)}


def paged() -> list[Recipe]:
    folder = Path(__file__).parents[2] / "baselines"
    texts = {path.stem: path.read_text() for path in sorted(folder.glob("*.yaml"))}
    names = [name for name, text in texts.items() if "stages:" not in text]
    found = [with_choices(Recipe.load(name), statistics="dense") for name in names]
    return [one for one in found if not one.unit.is_usual and not no_page(one)]


def test_every_published_recipe_of_one_step_for_units_has_a_page_without_an_idle_part(
    tmp_path: Path,
) -> None:
    recipes = paged()
    assert {"fasp", "flap", "mask_fisher", "obs_bias", "wanda_sp"} <= {one.name for one in recipes}
    for recipe in recipes:
        page = pruner_page(recipe)
        (tmp_path / f"{recipe.name}.py").write_text(page)
        for name in functions_of(page).keys() - {"prune_"}:
            assert len(re.findall(rf"\b{name}\b", page)) > 1, name
        tests = [node.test for node in ast.walk(ast.parse(page)) if isinstance(node, ast.If)]
        words = {"UNIT", "COMPARE", "MEMBERS", "COMBINE", "CHANNELS", "NORMALISE", "UPDATE"}
        used = {one.id for test in tests for one in ast.walk(test) if isinstance(one, ast.Name)}
        assert not used & words
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length", "100"]
    command += ["--select", "E,F,I,UP,B", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_page_says_its_formula_in_words_and_holds_what_that_needs_alone() -> None:
    page = pruner_page(recipe_of("neuron", "M2/PARAMS", compare="model", update="bias"))
    assert "    M2        sum over sequences of (mask gradient)^2" in page
    assert "A bias takes over what the removed gave on average." in page
    functions = functions_of(page)
    assert {"gone_of_all", "open_biases", "mlp"} <= functions.keys()
    assert not {"attention", "refit", "inverse_factor", "fits", "shares", "add_weight"} & {
        *functions
    }
    assert not {"measure", "listen"} & functions_of(pruner_page(recipe_of("neuron", "RND"))).keys()


def test_folding_keeps_the_branch_that_constants_take() -> None:
    source = "\n".join(
        [
            "def kind(x):",
            '    if WORD == "a":',
            "        return x",
            '    elif WORD == "b":',
            "        # why",
            "        if x:",
            "            return -x",
            "        return 0",
            "    else:",
            "        return None",
            "",
        ]
    )
    for word, wanted in (("a", 3), ("b", -3), ("c", None)):
        text, names = folded(source, {"WORD": word}), dict[str, Any]()
        exec(text, names)
        assert names["kind"](3) == wanted and "WORD" not in text
    assert "# why" in folded(source, {"WORD": "b"})
    assert folded(source, {"OTHER": 1}) == source


def run_page(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """The names of the program after it pruned the model `dense` of the folder into `pruned`."""
    (folder / "text.txt").write_text("every cat sat on a warm mat. " * 30)
    write_pruner(recipe, folder / "pruner.py")
    options = ["--output", "pruned", "--sequences", "4", "--length", "32", *words]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["pruner.py", "dense", "text.txt", *options])
    return runpy.run_path("pruner.py", run_name="__main__")


def test_as_a_program_it_saves_a_smaller_model_that_plain_transformers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    save_tiny_model("llama", tmp_path / "dense")
    recipe = recipe_of(criterion="Lrb", update=["refit", "bias"])
    names = run_page(recipe, tmp_path, monkeypatch, "--sparsity", "0.5", "--slice")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    dense = load_model(str(tmp_path / "dense"), dtype="float32")
    layers = check_recipe(dense, recipe, 0.5)
    windows = torch.cat(list(names["batches"]))
    statistics = calibrate(dense, windows, layers, dense_sums([recipe]))
    prune(dense, recipe, 0.5, statistics=statistics)
    assert found.config.intermediate_size < 64 and found.config.num_attention_heads == 2
    assert found.model.layers[0].mlp.down_proj.bias is not None
    torch.testing.assert_close(logits(found), logits(dense.model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "unit", "words", "said"),
    [
        ("gpt2", "kv_group", ["--sparsity", "0.5", "--slice"], "no configuration of GPT2LMHead"),
        ("gpt2", "head", ["--sparsity", "0.5"], "no query head can go by itself"),
        ("llama", "neuron", ["--sparsity", "1"], "below 1"),
        ("llama", "width", ["--sparsity", "0.99"], "0.99 cannot go: at most 0.8"),
    ],
)
def test_as_a_program_it_refuses_in_a_sentence_and_leaves_nothing(
    family: str,
    unit: str,
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_tiny_model(family, tmp_path / "dense")
    with pytest.raises(SystemExit, match=f"^refused: .*{said}"):
        run_page(recipe_of(unit, "A"), tmp_path, monkeypatch, *words)
    assert not (tmp_path / "pruned").exists()
