"""`--targets` and `--ignore` mean the same in prune, compare and search, from options to page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prunezero.errors import ModelError, SearchError
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.testbed import with_choices
from prunezero.searching.experiment.baselines import baselines
from prunezero.searching.workers.worker import EvaluatorPlan
from tests.cli.conftest import Run, flat, small_space
from tests.searching.testbed import make_task, tiny_space, tiny_testbed
from tests.tiny_models import tiny_tokenizer

CHOSEN = "--targets q_proj,mlp.up_proj --ignore re:layers\\.0\\."


def is_pruned(name: str) -> bool:
    return name.startswith("model.layers.1.") and name.endswith(("q_proj.weight", "up_proj.weight"))


def test_compare_prunes_the_chosen_layers_alone_as_prune_does(
    run: Run, tiny_files: tuple[Path, Path]
) -> None:
    common = f"MODEL --sparsity 0.5 --statistics dense {CHOSEN}"
    result = run(f"compare {common} --recipes wanda,magnitude --json rows.json")
    assert result.exit_code == 0, (result.output, result.exception)
    dense, wanda, _ = json.loads(Path("rows.json").read_text())["rows"]
    assert wanda["targets"] == "q_proj, mlp.up_proj" and wanda["ignore"] == "re:layers\\.0\\."
    assert "targets" not in dense
    assert "targets q_proj, mlp.up_proj" in flat(result.output)
    assert run(f"prune {common} --recipe wanda --json one.json --output pruned").exit_code == 0
    alone = json.loads(Path("one.json").read_text())
    assert alone["test_perplexity"] == wanda["test_perplexity"]
    before = load_file(tiny_files[0] / "model.safetensors")
    after = load_file("pruned/model.safetensors")
    changed = {name for name, weight in after.items() if not weight.equal(before[name])}
    assert changed == set(filter(is_pruned, before))


def test_options_stand_in_for_the_layers_that_a_recipe_names(run: Run) -> None:
    mine = with_choices(Recipe.load("wanda"), name="mine", targets=("k_proj",), ignore=("o_proj",))
    mine.save(Path("mine.yaml"))
    assert run("compare MODEL --sparsity 0.5 --recipes mine.yaml --json a.json").exit_code == 0
    told = "--recipes mine.yaml --targets v_proj --json b.json"
    assert run(f"compare MODEL --sparsity 0.5 {told}").exit_code == 0
    rows = [json.loads(Path(file).read_text())["rows"][-1] for file in ("a.json", "b.json")]
    assert [row["targets"] for row in rows] == ["k_proj", "v_proj"]
    assert [row["ignore"] for row in rows] == ["o_proj", "o_proj"]


@pytest.mark.parametrize("command", ["prune", "compare", "search --budget 4"])
def test_a_pattern_that_matches_no_layer_is_refused_by_every_command(
    command: str, run: Run
) -> None:
    result = run(f"{command} MODEL --sparsity 0.5 --targets q_prj")
    assert isinstance(result.exception, ModelError)
    assert "'q_prj' matches no layer; did you mean 'q_proj'?" in str(result.exception)


def test_a_search_of_some_layers_is_told_resumed_shown_verified_and_exported(run: Run) -> None:
    small_space(Path("small.yaml"))
    begun = "search MODEL --sparsity 0.5 --space small.yaml --budget 6 --name some --seed 3"
    result = run(f"{begun} {CHOSEN}")
    assert result.exit_code == 0, (result.output, result.exception)
    folder = Path("runs/some")
    asked = json.loads((folder / "search.json").read_text())
    assert asked["targets"] == ["q_proj", "mlp.up_proj"]
    recipe = Recipe.load(folder / "recipe.yaml")
    assert recipe.targets == ("q_proj", "mlp.up_proj") and recipe.ignore == ("re:layers\\.0\\.",)
    page = (folder / "pruner.py").read_text()
    assert "q_proj" in page and "up_proj" in page
    rows = json.loads((folder / "results.json").read_text())
    assert "q_proj" in json.dumps(rows)
    output = flat(run("show some").output)
    assert "targets q_proj, mlp.up_proj" in output and "ignore re:layers\\.0\\." in output
    assert run("search --name some --resume --budget 6").exit_code == 0
    again = run("search --name some --resume --budget 6 --targets q_proj")
    assert isinstance(again.exception, SearchError)
    assert "--targets q_proj,mlp.up_proj, now q_proj" in str(again.exception)
    checked = run("verify some --top 1 --json checks.json")
    assert checked.exit_code == 0, (checked.output, checked.exception)


def test_layers_are_a_condition_of_answers_and_travel_to_workers() -> None:
    testbed = tiny_testbed()
    every = make_task(tiny_space(), 0.5)
    some = make_task(tiny_space(), 0.5, targets=("q_proj",), ignore=("re:layers.0",))
    plan = EvaluatorPlan.of(some.config, [testbed])
    assert plan.conditions["targets"] == ["q_proj"] and plan.conditions["ignore"] == ["re:layers.0"]
    assert not {"targets", "ignore"} & EvaluatorPlan.of(every.config, [testbed]).conditions.keys()
    told = plan.config
    assert (told.targets, told.ignore) == (("q_proj",), ("re:layers.0",))
    assert {recipe.targets for recipe in baselines(some)} == {("q_proj",)}


def test_every_command_leaves_alone_what_the_forward_pass_never_calls(
    run: Run,
) -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    sizes = {"vocab_size": 97, "hidden_size": 32, "state_size": 8, "time_step_rank": 4}
    AutoModelForCausalLM.from_config(MambaConfig(num_hidden_layers=2, **sizes)).save_pretrained(
        "mamba"
    )
    tiny_tokenizer().save_pretrained("mamba")
    small_space(Path("small.yaml"), generation=3, measured=1)
    named = "2 more (dt_proj) are never called, and left alone"
    model = "MODEL --model mamba --sparsity 0.5"
    for command in (
        f"compare {model} --recipes magnitude,wanda",
        f"prune {model} --recipe magnitude --output whole",
        f"prune {model} --recipe magnitude --output blocks --memory-limit 1GiB",
        f"search {model} --space small.yaml --budget 3 --name one",
    ):
        result = run(command)
        assert result.exit_code == 0, (command, result.output, result.exception)
        assert flat(result.output).count(named) == 1, command
    before = load_file("mamba/model.safetensors")
    for folder in ("whole", "blocks"):
        after = load_file(f"{folder}/model.safetensors")
        changed = {name for name, weight in after.items() if not weight.equal(before[name])}
        assert changed and not any("dt_proj" in name for name in changed)
