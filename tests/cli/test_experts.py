"""`prunezero prune` takes experts out of a mixture, or says in one sentence why it cannot."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from prunezero.errors import PruneZeroError
from prunezero.pruning.recipes.recipe import Recipe
from tests.cli.conftest import Run, flat, typing
from tests.tiny_models import tiny_batches
from tests.tiny_moe import save_moe


@pytest.fixture(scope="session")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny mixtures, by family."""
    folder = tmp_path_factory.mktemp("mixtures")
    return {family: save_moe(family, folder / family) for family in ("mixtral", "deepseek_v3")}


@pytest.fixture
def on_mixture(run: Run, mixtures: dict[str, Path], tiny_files: tuple[Path, Path]) -> Run:
    """`run`, with `MODEL` for a mixture."""
    return typing((mixtures["mixtral"], tiny_files[1]))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_prune_saves_a_plain_model_with_fewer_experts_and_measures_what_it_saved(
    family: str, run: Run, mixtures: dict[str, Path], tiny_files: tuple[Path, Path]
) -> None:
    from transformers import AutoModelForCausalLM

    on = typing((mixtures[family], tiny_files[1]))
    result = on("prune MODEL --recipe reap --sparsity 0.34 --output out --json o.json")
    assert result.exit_code == 0, result.output
    said = flat(result.output)
    total = 12 if family == "mixtral" else 6
    assert f"{total // 3} of {total} experts are gone" in said
    assert "read anew, its logits differ by at most 0 from those in memory" in said
    row = json.loads(Path("o.json").read_text())
    assert (row["units"], row["units_removed"], row["unit"]) == (total, total // 3, "expert")
    assert row["removed_of"] == "units of experts"
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model(tiny_batches(1, 8)).logits.shape == (1, 8, 97)
    report = json.loads(Path("out/report.json").read_text())
    assert report["saved"]["kind"] == "plain"
    assert sum(one.numel() for one in model.parameters()) == report["costs"]["parameters"]
    assert report["costs"]["parameters"] < report["dense_costs"]["parameters"]
    again = on("compare MODEL --model out --recipes expert_random --sparsity 0 --json again.json")
    assert again.exit_code == 0, again.output
    dense, *_ = json.loads(Path("again.json").read_text())["rows"]
    assert dense["test_perplexity"] == pytest.approx(row["test_perplexity"], rel=1e-5)


def test_mixtures_that_keep_different_numbers_are_saved_with_classes_of_their_own(
    on_mixture: Run,
) -> None:
    result = on_mixture("prune MODEL --recipe seer --sparsity 0.25 --output out --json o.json")
    assert result.exit_code == 0, result.output
    assert "layers differ in size, so load it by" in flat(result.output)
    report = json.loads(Path("out/report.json").read_text())
    assert report["saved"]["kind"] == "own_class" and report["saved"]["largest_difference"] == 0
    told = json.loads(Path("out/config.json").read_text())["per_layer_config"]
    assert sum(one["num_local_experts"] for one in told.values()) == 12 - 3
    again = on_mixture("compare MODEL --model out --recipes reap --sparsity 0 --json again.json")
    assert again.exit_code == 0, again.output
    dense, *_ = json.loads(Path("again.json").read_text())["rows"]
    row = json.loads(Path("o.json").read_text())
    assert dense["test_perplexity"] == pytest.approx(row["test_perplexity"], rel=1e-5)


@pytest.mark.parametrize("sparsity", [0, 0.34])
def test_prune_saves_a_folder_whose_tokens_skip_experts(sparsity: float, on_mixture: Run) -> None:
    command = f"prune MODEL --recipe dynamic_skipping --sparsity {sparsity}"
    result = on_mixture(f"{command} --output out --json o.json")
    assert result.exit_code == 0, result.output
    said, row = flat(result.output), json.loads(Path("o.json").read_text())
    assert 0.1 < row["expert_calls_skipped"] < 0.4
    assert f"skip {row['expert_calls_skipped']:.1%} of the calls of experts" in said
    assert "its tokens skip experts, so load it by" in said
    assert f"{0 if sparsity == 0 else 4} of 12 experts are gone" in said
    report = json.loads(Path("out/report.json").read_text())
    assert report["saved"]["kind"] == "own_skipping"
    assert report["costs"]["flops"] < report["dense_costs"]["flops"]
    again = on_mixture(
        "compare MODEL --model out --recipes magnitude --sparsity 0 --json again.json"
    )
    assert again.exit_code == 0, again.output
    dense, *_ = json.loads(Path("again.json").read_text())["rows"]
    assert dense["test_perplexity"] == pytest.approx(row["test_perplexity"], rel=1e-5)


@pytest.mark.filterwarnings("ignore::prunezero.errors.PruneZeroWarning")
def test_compare_measures_each_recipe_on_the_dense_model(on_mixture: Run) -> None:
    # A recipe of weights beside them has sums of linear maps seen as well.
    assert on_mixture("compare MODEL --recipes reap,wanda --sparsity 0.34").exit_code == 0
    names = "expert_random,reap,seer,expert_sparsity,expert_sparsity_progressive,expert_random"
    # No smaller model is made where constants stay.
    result = on_mixture("compare MODEL --recipes mone --sparsity 0.34 --json means.json")
    assert result.exit_code == 0, result.output
    _, means = json.loads(Path("means.json").read_text())["rows"]
    assert means["units_removed"] == 4 and "parameters" not in means
    result = on_mixture(f"compare MODEL --recipes {names} --sparsity 0.34 --json o.json")
    assert result.exit_code == 0, result.output
    dense, first, *others, last = json.loads(Path("o.json").read_text())["rows"]
    assert first["test_perplexity"] == last["test_perplexity"] != dense["test_perplexity"]
    assert {one["units_removed"] for one in (first, *others, last)} == {4}
    assert {one["parameters"] for one in (first, *others, last)} == {first["parameters"]}
    assert first["parameters"] < dense["parameters"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("--recipe reap --sparsity 0.9", "leaves 1, but at least 2 have to stay; remove less"),
        ("--recipe mone --sparsity 0.34 --output out", "so such a model cannot be saved; leave"),
        ("--recipe reap --sparsity 0.34 --output out --padded", "no zeros stand for experts"),
        ("--recipe reap --sparsity 0.34 --targets q_proj", "of which experts are stacks"),
        (
            "--recipe reap --sparsity 0.34 --output out --memory-limit 900MiB",
            "cannot be run block by block: unit expert sees which experts the router",
        ),
    ],
)
def test_what_cannot_be_done_to_experts_is_said_in_one_sentence(
    command: str, said: str, on_mixture: Run
) -> None:
    result = on_mixture(f"prune MODEL {command}")
    assert isinstance(result.exception, PruneZeroError), result.output
    assert said in str(result.exception)
    assert set(os.listdir()) <= {"cache"}


def test_a_dense_model_has_no_experts_to_take_out(run: Run) -> None:
    result = run("prune MODEL --recipe reap --sparsity 0.25 --output out")
    assert isinstance(result.exception, PruneZeroError), result.output
    assert "LlamaForCausalLM has no mixture of experts" in str(result.exception)


@pytest.mark.filterwarnings("ignore::prunezero.errors.PruneZeroWarning")
def test_a_search_of_experts_goes_on_and_its_winner_is_verified(on_mixture: Run) -> None:
    search = "search MODEL --sparsity 0.34 --space experts"
    result = on_mixture(f"{search} --budget 8 --name whole --json whole.json")
    assert result.exit_code == 0, result.output
    assert "expert_sparsity" in result.output and "left out of" not in result.output
    assert Recipe.load("runs/whole/recipe.yaml").unit.word == "expert"
    for words in ("--budget 4 --name cut", "--budget 8 --resume --name cut --json cut.json"):
        # Results of the other search would be found in the archive.
        Path("runs/archive.jsonl").unlink(missing_ok=True)
        result = on_mixture(f"{search} {words}")
        assert result.exit_code == 0, result.output
    rows = [json.loads(Path(f"{name}.json").read_text())["rows"] for name in ("whole", "cut")]
    told = [[(one["recipe"], one.get("test_perplexity")) for one in found] for found in rows]
    recipes = [Recipe.load(f"runs/{name}/recipe.yaml").effect for name in ("whole", "cut")]
    assert recipes[0] == recipes[1]
    assert [score for _, score in told[0]] == [score for _, score in told[1]]
    result = on_mixture("verify cut")
    assert result.exit_code == 0, result.output


@pytest.mark.filterwarnings("ignore::prunezero.errors.PruneZeroWarning")
def test_routers_of_groups_leave_out_what_nobody_knows_of_one_expert(
    mixtures: dict[str, Path], tiny_files: tuple[Path, Path], run: Run
) -> None:
    on = typing((mixtures["deepseek_v3"], tiny_files[1]))
    result = on("search MODEL --sparsity 0.34 --space experts --budget 3 --name x")
    assert result.exit_code == 0, result.output
    assert "left out of the search space: LOO (no expert of model.layers.1.mlp" in flat(
        result.output
    )
    assert "LOO" not in Recipe.load("runs/x/recipe.yaml").text
