"""What is a search asked to do, on what, and by whom? As typed now, or when it began."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from prunezero.cli.options import make_settings
from prunezero.errors import RecipeError, shell_word

if TYPE_CHECKING:
    from prunezero.pruning.testbed import Settings, Testbed
    from prunezero.report.runs.search_file import Asked
    from prunezero.searching.evaluation.rungs import Evaluators
    from prunezero.searching.workers.worker import Plan

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


def check_hands(workers: int, threads: int | None, cluster: str | None) -> None:
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


def asked(ctx: typer.Context, folder: Path | None) -> tuple[Asked, Settings]:
    """What a search is asked to do, and its sizes.

    Args:
        ctx: of the command, with the options as typed.
        folder: of the search to go on with, whose options stand in for those that were not typed.

    Raises:
        PruneZeroError: options that are faulty, or other than those the search was begun under.
    """
    from prunezero.report.runs.search_file import asked_for, goes_on, read_asked
    from prunezero.report.runs.warm_start import rules_of

    before = None if folder is None else read_asked(folder)
    if folder is None or before is None:
        runs_dir, names = ctx.params["runs_dir"], ctx.params["start_from"] or ()
        found = asked_for(ctx.params, [rule for name in names for rule in rules_of(name, runs_dir)])
    else:
        typed = {key: value for key, value in ctx.params.items() if _is_typed(ctx, key)}
        found = goes_on(before, typed, folder)
    settings = make_settings(
        found.sequence_length,
        found.calibration_tokens,
        found.evaluation_tokens,
        found.test_tokens,
        found.seed,
    )
    return found, settings


def testbeds(asked: Asked, settings: Settings) -> list[Testbed]:
    """The models that were asked for, its own first, each on the same text.

    Raises:
        PruneZeroError: a model or the text cannot be loaded, or a model is named twice.
    """
    from prunezero.cli.tables import say_about, waiting
    from prunezero.pruning.testbed import set_up
    from prunezero.searching.experiment.testbeds import beside

    names = ", ".join([asked.model, *asked.also_model])
    with waiting(f"loading {names} and {asked.text} text"):
        first = set_up(asked.model, asked.text, settings, dtype=asked.dtype, device=asked.device)
        found = [first, *beside(first, asked.also_model, device=asked.device)]
    say_about(found)
    return found


def _is_typed(ctx: typer.Context, key: str) -> bool:
    source = ctx.get_parameter_source(key)
    return source is not None and not source.name.startswith("DEFAULT")


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


def staff(
    workers: int, threads: int | None, cluster: str | None
) -> Callable[[Plan], Evaluators] | None:
    """Who hires judges beside this process; None where it judges alone."""
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
