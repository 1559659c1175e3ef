"""An exported page must prune exactly the weights that the engine prunes, without the engine."""

from __future__ import annotations

import ast
import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prunezero.errors import OutputError
from prunezero.formula.criterion import Criterion
from prunezero.formula.features import features_of_domain
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.anatomy.patterns import fitting
from prunezero.models.loading.load import load_model
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.testbed import with_choices
from prunezero.report.export import expert_parts, page_parts, pruner_template
from prunezero.report.export.kernel import write_kernel
from prunezero.report.export.page import pruner_page, write_pruner
from prunezero.scoring.feature_values import needed_sums
from prunezero.scoring.score import keep_mask, score
from prunezero.scoring.selection import select_model
from tests.report.recipes import recipe_of
from tests.tiny_models import (
    FAMILIES,
    VOCABULARY,
    save_tiny_model,
    tiny_batches,
    tiny_model,
    tiny_network,
    tiny_tokenizer,
)

FORMULAS = {
    "magnitude": "abs(W)",
    "wanda": "abs(W)*X",
    "ria": "(abs(W)/C1 + abs(W)/R1)*sqrt(X)",
    "pruner-zero": "sqr(W)*minmax(G)",
    "gblm": "abs(W)*(X + 100*G1)",
    "reductions": "abs(W)*row_norm(W)*col_mean(G)/layer_max(R1)",
}


def page_module(fields: Recipe, folder: Path) -> Any:
    path = folder / "pruner.py"
    write_pruner(fields, path)
    specification = importlib.util.spec_from_file_location(f"pruner_{folder.name}", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def engine_masks(family: str, fields: Recipe, sparsity: float) -> dict[str, torch.Tensor]:
    language_model = tiny_model(family)
    layers = find_linears(
        language_model.model, targets=list(fields.targets), ignore=list(fields.ignore)
    )
    sums = needed_sums(fields.formulas)
    statistics = calibrate(language_model, tiny_batches(), layers, sums)
    if fields.compare == "model" and fields.pattern == "free":
        scores = [score(fields.criterion, one.weight, statistics.get(one.name)) for one in layers]
        chosen = select_model(scores, sparsity)
        return {layer.name: mask for layer, mask in zip(layers, chosen, strict=True)}
    return {
        layer.name: keep_mask(
            fitting(fields.criteria, layer.name, fields.criterion),
            layer.weight,
            statistics.get(layer.name),
            sparsity,
            compare=fields.compare,
            pattern=fields.pattern,
            layer=layer.name,
        )
        for layer in layers
    }


def assert_page_equals_engine(
    family: str, fields: Recipe, folder: Path, sparsity: float = 0.5
) -> None:
    network = tiny_model(family).model
    before = {name: value.clone() for name, value in network.state_dict().items()}
    page = page_module(fields, folder)
    batches = torch.split(tiny_batches(), 1)
    report = page.prune_(network, batches, sparsity=sparsity, pattern=fields.pattern)
    masks = engine_masks(family, fields, sparsity)
    assert list(report["layers"]) == list(masks)
    changed = dict(network.state_dict())
    for layer in find_linears(network):
        if layer.name in masks:
            key = f"{layer.name}.weight"
            is_transposed = not isinstance(layer.module, torch.nn.Linear)
            dense = before[key].T if is_transposed else before[key]
            expected = torch.where(masks[layer.name], dense, 0.0)
            assert torch.equal(layer.weight, expected), layer.name
            assert not torch.signbit(layer.weight[layer.weight == 0]).any()
            changed.pop(key)
    for key, value in changed.items():
        assert torch.equal(value, before[key]), f"{key} must stay as it was"


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_page_prunes_the_very_weights_that_the_engine_prunes(
    name: str, family: str, tmp_path: Path
) -> None:
    fields = recipe_of(name=name, criterion=Criterion.parse(FORMULAS[name]))
    assert_page_equals_engine(family, fields, tmp_path)


@pytest.mark.parametrize("pattern", ["free", "2:4"])
def test_page_ranks_some_layers_by_formulas_of_their_own(pattern: str, tmp_path: Path) -> None:
    own = {"down_proj": "abs(W)*sqrt(G)", "re:attn.[kv]_proj": "abs(W)/C1"}
    criteria = {layers: Criterion.parse(text) for layers, text in own.items()}
    fields = recipe_of("w", Criterion.parse("abs(W)*X"), criteria=criteria, pattern=pattern)
    assert_page_equals_engine("llama", fields, tmp_path)
    page = pruner_page(fields).replace("\n", " ")
    assert "`abs(W)*X; down_proj: abs(W)*sqrt(G); re:attn.[kv]_proj: abs(W)/C1`" in page
    other = page_module(
        with_choices(fields, criteria={"mlp.down": criteria["down_proj"]}), tmp_path
    )
    with pytest.raises(other.RefusalError, match=r"no layer matches 'mlp.down'"):
        other.prune_(tiny_model().model, torch.split(tiny_batches(), 1), sparsity=0.5)
    with pytest.raises(OutputError, match="formulas of its own for down_proj, re:attn"):
        write_kernel(fields, tmp_path / "kernel.py")


@pytest.mark.parametrize("family", FAMILIES)
def test_page_finds_the_layers_of_every_family(family: str, tmp_path: Path) -> None:
    fields = recipe_of(name="wanda", criterion=Criterion.parse("abs(W)*X"))
    assert_page_equals_engine(family, fields, tmp_path, sparsity=0.29)


@pytest.mark.parametrize("feature", features_of_domain("matrix"))
def test_every_feature_has_the_same_value_in_a_page(feature: str, tmp_path: Path) -> None:
    criterion = Criterion.parse(f"abs(W)*{feature}" if feature != "W" else "W")
    fields = recipe_of(name=feature, criterion=criterion, compare="layer")
    assert_page_equals_engine("llama", fields, tmp_path)


@pytest.mark.parametrize(
    ("compare", "pattern", "sparsity"),
    [
        ("layer", "free", 0.7),
        ("24 columns", "free", 0.3),
        ("model", "free", 0.5),
        ("model", "free", 0.0),
        ("model", "2:4", 0.5),
        ("row", "2:4", 0.5),
        ("row", "1:4", 0.75),
    ],
)
def test_page_knows_the_groups_and_patterns(
    compare: str, pattern: str, sparsity: float, tmp_path: Path
) -> None:
    criterion = Criterion.parse("abs(W)*X")
    fields = recipe_of(name="w", criterion=criterion, compare=compare, pattern=pattern)
    assert_page_equals_engine("llama", fields, tmp_path, sparsity)


def test_page_prunes_the_layers_that_the_recipe_names(tmp_path: Path) -> None:
    fields = recipe_of(
        name="w",
        criterion=Criterion.parse("abs(W)*X"),
        targets=("q_proj", "re:mlp"),
        ignore=("0.mlp.down_proj",),
    )
    assert_page_equals_engine("llama", fields, tmp_path)


def test_ties_and_signed_zeros_lose_the_lower_index() -> None:
    scores = torch.tensor([[0.0, -0.0, 1.0, -0.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    keep = pruner_template.mask(scores, 0.4)
    assert keep.tolist() == [[False, False, True, True, True]] * 2


def test_ties_across_layers_lose_the_earlier_layer(tmp_path: Path) -> None:
    page = page_module(recipe_of("w", Criterion.parse("W"), compare="model"), tmp_path)
    weights = {"a": torch.tensor([[1.0, 3.0]]), "b": torch.tensor([[1.0, -0.0], [0.0, 1.0]])}
    kept = page.masks(weights, {"a": {}, "b": {}}, 0.5, "free")
    assert kept["a"].tolist() == [[False, True]]
    assert kept["b"].tolist() == [[True, False], [False, True]]


def test_page_collects_only_the_sums_of_its_formula() -> None:
    gradient_page = pruner_page(recipe_of("g", Criterion.parse("abs(W)*G")))
    assert "gradient_square_sum" in gradient_page and "input_square_sum" not in gradient_page
    weight_page = pruner_page(recipe_of("m", Criterion.parse("abs(W)")))
    assert "_sum" not in weight_page.split("def prune_")[0]


def test_template_is_the_exported_wanda_but_for_its_words() -> None:
    page = functions_of(pruner_page(recipe_of("wanda", Criterion.parse("abs(W)*X"))))
    files = [
        Path(str(module.__file__)).read_text()
        for module in (pruner_template, page_parts, expert_parts)
    ]
    theirs = {name: text for file in files for name, text in functions_of(file).items()}
    assert theirs.keys() - page.keys() == {"inverse_factor", "inverse_of_upper", "add_row"}
    assert [name for name, text in page.items() if text != theirs[name]] == ["listen"]


def functions_of(text: str) -> dict[str, str]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: ast.dump(node) for node in ast.parse(text).body if isinstance(node, kinds)}


@pytest.mark.parametrize(
    ("choice", "value"),
    [("update", "obs"), ("allocate", "owl"), ("recover", "tune")],
)
def test_recipes_that_a_page_cannot_follow_are_refused(choice: str, value: str) -> None:
    fields = recipe_of("mine", Criterion.parse("abs(W)"), **{choice: value})
    with pytest.raises(OutputError, match=f"{choice}: {value}, which .* cannot follow"):
        pruner_page(fields)


def test_all_that_a_page_cannot_follow_is_told_at_once_and_what_an_option_mends_last() -> None:
    fields = recipe_of("mine", Criterion.parse("abs(W)"), update="obs", statistics="sequential")
    with pytest.raises(OutputError, match="update: obs, which"):
        pruner_page(fields)
    with pytest.raises(OutputError, match="update: obs, permute: heuristic, which"):
        pruner_page(with_choices(fields, permute="heuristic", pattern="2:4"))
    with pytest.raises(OutputError, match="add --statistics dense"):
        pruner_page(with_choices(fields, update="none"))


def network_of(configuration: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(configuration, dtype=torch.float32).eval()


@pytest.mark.parametrize("formula", ["abs(W)", "abs(W)*X", "abs(W)*G*D"])
def test_layers_that_nothing_calls_are_named_once_and_left_alone(
    formula: str, tmp_path: Path
) -> None:
    from transformers import MambaConfig

    sizes = {"state_size": 8, "time_step_rank": 4, "hidden_size": 32, "num_hidden_layers": 2}
    network = network_of(MambaConfig(vocab_size=VOCABULARY, **sizes))
    before = network.backbone.layers[1].mixer.dt_proj.weight.clone()
    page = page_module(recipe_of("m", Criterion.parse(formula)), tmp_path)
    with pytest.warns(UserWarning, match=r"layers\.0.*dt_proj, .*layers\.1.*dt_proj$") as told:
        report = page.prune_(network, torch.split(tiny_batches(), 1), 0.5)
    assert len([one for one in told if "left alone" in str(one.message)]) == 1
    assert torch.equal(network.backbone.layers[1].mixer.dt_proj.weight, before)
    assert len(report["layers"]) == 6 and report["sparsity"] == 0.5


def test_a_model_that_changes_its_own_weights_is_refused(tmp_path: Path) -> None:
    from transformers import RwkvConfig

    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
    network = network_of(RwkvConfig(vocab_size=VOCABULARY, rescale_every=1, **sizes))
    page = page_module(recipe_of("m", Criterion.parse("abs(W)")), tmp_path)
    with pytest.raises(page.RefusalError, match="own forward pass changes its weights"):
        page.prune_(network, [], 0.5)


@pytest.mark.parametrize(
    ("batches", "sentence"),
    [
        ([], "0 sequences"),
        ([torch.tensor([[5]])], "1 tokens; the model takes 2 to 64"),
        ([torch.full((1, 65), 5)], "65 tokens; the model takes 2 to 64"),
        ([torch.tensor([[5, VOCABULARY]])], "not in the model's vocabulary"),
        ([torch.tensor([5, 6])], r"must be int64 \[1, length\]"),
        ([torch.ones(1, 4)], r"must be int64 \[1, length\] but are torch.float32"),
    ],
)
def test_page_refuses_text_that_the_model_cannot_be_run_on(
    batches: list[torch.Tensor], sentence: str, tmp_path: Path
) -> None:
    page = page_module(recipe_of("w", Criterion.parse("abs(W)*X")), tmp_path)
    with pytest.raises(page.RefusalError, match=sentence):
        page.prune_(tiny_model().model, batches, 0.5)


@pytest.mark.parametrize(
    ("formula", "where", "sentence"),
    [
        ("abs(W)*X", "model.embed_tokens", "the inputs of .*q_proj hold NaN"),
        ("abs(W)*G", "lm_head", "the loss of a sequence is nan"),
        ("W**2/U", "model.embed_tokens", "the inputs of .*q_proj hold NaN"),
        ("C1", "model.layers.0.mlp.up_proj", "up_proj scores that are NaN"),
        ("X", "model.layers.1.mlp.down_proj", "weight of .*1.mlp.down_proj holds NaN"),
    ],
)
def test_page_refuses_models_with_numbers_that_are_none(
    formula: str, where: str, sentence: str, tmp_path: Path
) -> None:
    network: Any = tiny_network("llama", tie_word_embeddings=False)
    with torch.no_grad():
        network.get_submodule(where).weight[:, 0] = float("nan")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fields = recipe_of("w", Criterion.parse(formula), compare="layer")
    page = page_module(fields, tmp_path)
    with pytest.raises(page.RefusalError, match=sentence):
        page.prune_(network, torch.split(tiny_batches(), 1), 0.001)
    after = network.state_dict()
    assert all(torch.equal(after[name].nan_to_num(7), before[name].nan_to_num(7)) for name in after)


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    fields = recipe_of("m", Criterion.parse("abs(W)"))
    with pytest.raises(OutputError, match="cannot be written"):
        write_pruner(fields, tmp_path / "missing" / "pruner.py")


def test_page_is_clean_by_our_own_linter(tmp_path: Path) -> None:
    criterion = Criterion.parse("abs(W)*(X + 100*G1)*D + abs(X_mean)*Y + X_var/U + V")
    write_pruner(recipe_of("all sums", criterion, source="s " * 90), tmp_path / "pruner.py")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length", "100"]
    command += ["--select", "E,F,I,UP,B", str(tmp_path / "pruner.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run_page(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """The names of the program after it pruned the model `dense` of the folder into `pruned`."""
    (folder / "text.txt").write_text("every cat sat on a warm mat. " * 30)
    write_pruner(recipe, folder / "pruner.py")
    options = ["--output", "pruned", "--sequences", "4", "--length", "32", *words]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["pruner.py", "dense", "text.txt", *options])
    return runpy.run_path("pruner.py", run_name="__main__")


@pytest.mark.parametrize(
    ("family", "criterion", "choices", "sparsity", "told"),
    [
        ("gpt2", "X", {"compare": "model"}, 0.5, "0.5000"),
        ("gpt2", "R2/D", {"compare": "layer"}, 0.29, "0.2897"),
        ("llama", "abs(W)*sqrt(V)", {"pattern": "1:4"}, None, "0.7500"),
        ("opt", "abs(W)*X", {"ignore": ["re:(?i)FC1"], "compare": "7 columns"}, 0.3, "0.2988"),
    ],
)
def test_page_as_a_program_saves_what_the_engine_would(
    family: str,
    criterion: str,
    choices: dict[str, Any],
    sparsity: float | None,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from safetensors.torch import load_file

    save_tiny_model(family, tmp_path / "dense")
    fields = {"name": "mine", "criterion": criterion, **choices}
    recipe = validated(Recipe, fields, "mine.yaml")
    words = [] if sparsity is None else ["--sparsity", str(sparsity)]
    names = run_page(recipe, tmp_path, monkeypatch, *words)
    dense = load_model(str(tmp_path / "dense"), dtype="float32")
    layers, sums = find_linears(dense.model), dense_sums([recipe])
    statistics = calibrate(dense, torch.cat(list(names["batches"])), layers, sums)
    outcome = prune(dense, recipe, sparsity, statistics=statistics)
    saved = load_file(tmp_path / "pruned" / "model.safetensors")
    wanted = dense.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in saved.items())
    assert f"{outcome.zeros} weights are zero, sparsity {told}" in capsys.readouterr().out


def test_page_computes_in_float32_and_keeps_the_dtype_of_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    network: Any = tiny_network("llama").half()
    network.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    recipe = Recipe.load("magnitude")
    run_page(recipe, tmp_path, monkeypatch, "--sparsity", "0.5")
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("dense", "pruned"))
    for name, value in before.items():
        assert after[name].dtype == torch.float16
        assert torch.equal(after[name], torch.where(after[name] == 0, 0.0, value).half())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "say how much to remove"),
        (["--sparsity", "1"], "below 1"),
        (["--pattern", "3:5"], "needs a multiple of 5 columns, but model.layers.0.*32"),
        (["--pattern", "4:2"], "neither free nor N:M"),
        (["--pattern", "2:4", "--sparsity", "0.6"], "2:4 removes 0.5 of the weights, not 0.6"),
    ],
)
def test_page_as_a_program_refuses_in_a_sentence_and_leaves_nothing(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("llama", tmp_path / "dense")
    with pytest.raises(SystemExit, match=f"^refused: .*{sentence}"):
        run_page(Recipe.load("magnitude"), tmp_path, monkeypatch, *words)
    assert not (tmp_path / "pruned").exists()


def test_page_runs_as_a_program_and_saves_the_pruned_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    save_tiny_model("llama", tmp_path / "dense")
    (tmp_path / "text.txt").write_text("every cat sat on a warm mat. " * 30)
    write_pruner(recipe_of("wanda", Criterion.parse("abs(W)*X")), tmp_path / "pruner.py")
    command = [sys.executable, "pruner.py", "dense", "text.txt", "--output", "pruned"]
    command += ["--sparsity", "0.25", "--sequences", "4", "--length", "32"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "sparsity 0.2500" in done.stdout
    weights = load_file(tmp_path / "pruned" / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    assert (weights[name] == 0).float().mean() == 0.25


def test_page_keeps_settings_byte_for_byte_and_saves_for_whoever_may_read_new_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, pruned = tmp_path / "dense", tmp_path / "pruned"
    save_tiny_model("llama", dense)
    for path in dense.glob("*.json"):
        path.write_text(path.read_text() + "\n ")
    run_page(Recipe.load("magnitude"), tmp_path, monkeypatch, "--sparsity", "0.5")
    for path in dense.glob("*.json"):
        assert (pruned / path.name).read_bytes() == path.read_bytes(), path.name
    modes = {path.name: path.stat().st_mode for path in pruned.iterdir()}
    assert modes["model.safetensors"] == (tmp_path / "text.txt").stat().st_mode
