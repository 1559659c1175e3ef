"""Setup of a search: its experiment as typed now or when it began, its models, its workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunezero.cli.options import check_settings
from prunezero.errors import RecipeError, shell_word

if TYPE_CHECKING:
    from prunezero.pruning.testbed import Testbed
    from prunezero.searching.evaluation.rungs import Evaluators
    from prunezero.searching.experiment.config import SearchConfig, StartingRule
    from prunezero.searching.workers.worker import EvaluatorPlan

# Where searches are when --runs-dir is not typed.
_USUAL = Path("runs")


def check_limits(budget: int | None, seconds: float | None, resume: bool, name: str | None) -> None:
    """Refuse a search that would never end, or that nobody could find again.

    Raises:
        RecipeError: it is one.
    """
    if budget is None and seconds is None:
        raise RecipeError("say how long to search: --budget N candidates, or --time such as 10m")
    if resume and name is None:
        raise RecipeError("--resume needs the --name of the search to go on with")


def check_workers(workers: int, threads: int | None, cluster: str | None) -> None:
    """Refuse more processes or threads than this machine bears; a cluster counts its own.

    More threads than cores are of use only to repeat the sums of a larger machine, to the last bit.

    Raises:
        RecipeError: there are.
    """
    cores = os.cpu_count() or 1
    ends = {"--workers": (workers, 16), "--threads": (threads or 1, 64)}
    for option, (wanted, least_end) in ends.items():
        most = max(least_end, 4 * cores)
        if wanted > most and cluster is None:
            raise RecipeError(
                f"{option} must be 1 to {most} on this machine of {cores} cores but is {wanted}"
            )


def config_of(typed: Mapping[str, Any], folder: Path | None, runs_dir: Path) -> SearchConfig:
    """The experiment that options ask for.

    Args:
        typed: options by the fields of `SearchConfig`, those that were typed alone.
        folder: of the search to go on with, whose options stand in for those that were not typed.
        runs_dir: where `start_from` finds searches by name.

    Raises:
        PruneZeroError: options that are faulty, or other than those the search was begun under.
    """
    from prunezero.report.runs.search_file import continued, headed, read_config
    from prunezero.searching.experiment.config import SearchConfig

    before = None if folder is None else read_config(folder) or headed(folder)
    if folder is None or before is None:
        config = SearchConfig.of(**typed)
        _refuse_test_text(config, typed)
        start = _starting(config, typed.get("start_from", ()), runs_dir)
        config = config.model_copy(update={"start": start})
    else:
        config = continued(before, typed, folder)
    check_settings(config.settings)
    return config


def _refuse_test_text(config: SearchConfig, typed: Mapping[str, Any]) -> None:
    if config.is_run_time and "test_tokens" in typed:
        raise RecipeError(
            f"search space {config.space_content.name} reads no test text: its front is compared "
            "with published recipes on validation text; leave --test-tokens out"
        )


def _starting(
    config: SearchConfig, names: Sequence[str], runs_dir: Path
) -> tuple[StartingRule, ...]:
    """The rules that searches and recipes of these names lead to."""
    from prunezero.report.runs.attention_run import recipes_of_keys
    from prunezero.report.runs.warm_start import rules_of
    from prunezero.searching.attending.proposals import choices_of, seeds_of
    from prunezero.searching.experiment.config import starting_rules
    from prunezero.searching.experiment.rule import Rule

    if config.is_run_time:
        recipes = [one for name in names for one in recipes_of_keys(name, runs_dir)]
        # Refuses by their names those that no search of the space can start from.
        seeds_of(config.space_content, recipes)
        return starting_rules([Rule(one.criterion, choices_of(one)) for one in recipes])
    return starting_rules([rule for name in names for rule in rules_of(name, runs_dir)])


def check_alone(
    config: SearchConfig, workers: int, cluster: str | None, memory: int | None
) -> None:
    """Refuse workers and a limit on memory in a search that has none.

    Raises:
        RecipeError: some are asked for.
    """
    asked = {"--workers": workers > 1, "--cluster": cluster, "--memory-limit": memory}
    option = next((name for name, value in asked.items() if value), None)
    if option is not None:
        raise RecipeError(
            f"search space {config.space_content.name} is of unit: {config.space_content.unit}, "
            f"whose recipes are measured in this process and its memory; leave {option} out"
        )


def loaded(config: SearchConfig) -> list[Testbed]:
    """The models of an experiment, its own first, each on the same text.

    Raises:
        PruneZeroError: a model or the text cannot be loaded, or a model is named twice.
    """
    from prunezero.cli.tables import say_about, waiting
    from prunezero.pruning.testbed import set_up
    from prunezero.searching.experiment.testbeds import beside

    names = ", ".join([config.model, *config.also_model])
    with waiting(f"loading {names} and {config.text} text"):
        sizes, device = config.settings, config.device
        first = set_up(config.model, config.text, sizes, dtype=config.dtype, device=device)
        found = [first, *beside(first, config.also_model, device=device)]
    say_about(found)
    return found


def typed_name(folder: Path) -> str:
    """The search in a folder as `show` and `verify` take it: by its name where that is enough."""
    return shell_word(folder.name if folder.parent == _USUAL else folder)


def way_on(folder: Path) -> str:
    """The command that goes on with the search in a folder, but for how long."""
    where = "" if folder.parent == _USUAL else f" --runs-dir {shell_word(folder.parent)}"
    return f"prunezero search --name {shell_word(folder.name)} --resume{where}"


def kept(folder: Path, budget: int | None, seconds: float | None) -> str:
    """What there is of a search that was stopped, and the command that goes on."""
    if not (folder / "journal.jsonl").is_file():
        return (
            "stopped before its first result, so there is nothing to keep but what calibration has "
            "cached; type the same command again"
        )
    return (
        f"stopped; everything is in {folder}, and goes on from here by\n"
        f"  {way_on(folder)} {limits(budget, seconds)}"
    )


def limits(budget: int | None, seconds: float | None) -> str:
    """How long a search was to last, as typed."""
    typed = {"--budget": budget, "--time": None if seconds is None else f"{seconds:g}s"}
    return " ".join(f"{option} {value}" for option, value in typed.items() if value is not None)


def pool_of(
    workers: int, threads: int | None, cluster: str | None
) -> Callable[[EvaluatorPlan], Evaluators] | None:
    """What makes a pool of workers beside this process; None where it evaluates alone."""
    import torch

    from prunezero.cli.tables import say
    from prunezero.searching.workers.processes import process_pool, usable_cores

    if cluster is not None:
        from prunezero.searching.workers.cluster import ray_pool

        return lambda plan: ray_pool(plan, cluster, workers, threads=threads)
    if workers == 1:
        torch.set_num_threads(threads or torch.get_num_threads())
        return None
    each = threads or max(1, usable_cores() // workers)
    say(f"{workers} workers with {each} {'thread' if each == 1 else 'threads'} each")
    return lambda plan: process_pool(plan, workers, threads=each)
