"""How do the measured candidates of a search look to Optuna's tools? As the trials of one study.

The study is written in the form of Optuna's journal files, which `optuna-dashboard FILE` opens. It
is a view of what the search found, made anew each time, and the search never reads it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from prunezero.formula.feature_row import SIGNALS
from prunezero.models.measures import TO_DENSE
from prunezero.searching.experiment.budgets import in_words
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.task import Task

# What a trial also tells, where it is known.
TOLD = (
    "slot",
    "generation",
    "origin",
    "formula",
    "layer_error",
    *TO_DENSE,
    "validation_perplexity",
    "seconds",
)
# A study needs dates and a search has none: its clock counts the seconds spent on candidates from
# here, so that the same candidates always make the same study.
_BEGINNING = datetime(2000, 1, 1, tzinfo=UTC)


class _Lines:
    """What Optuna asks of the backend of a journal, in memory: its files sync at every line."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        return self.lines[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.lines += logs


def study_journal(candidates: Sequence[Candidate], task: Task, name: str) -> str:
    """The text of a file in which Optuna finds a study with a trial for each measured candidate.

    Equal candidates give equal text; without a measured one it is empty. Parameters of a trial are
    the choices that the search makes, and what can be said of a formula in words and small numbers.

    Args:
        candidates: in order of slots; those of a known mask were not measured themselves.
        name: of the study.
    """
    measured = [one for one in candidates if one.status == "new" and one.search_fitness is not None]
    if not measured:
        return ""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    lines = _Lines()
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(lines),
        study_name=name,
        directions=["maximize" if task.objective.rises else "minimize", "minimize"],
    )
    _describe(study, task)
    study.add_trials(_trials(measured, task))
    # Optuna draws a new name for whoever writes.
    plain = [{**line, "worker_id": "prunezero"} for line in lines.lines]
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in plain)


def _describe(study: Any, task: Task) -> None:
    with warnings.catch_warnings():
        # Optuna still calls names of objectives an experiment.
        warnings.simplefilter("ignore")
        study.set_metric_names(_objectives(task))
    for key in ("space", "signals", "sparsity", "strategy", "seed"):
        study.set_user_attr(key, task.config.shown()[key])
    study.set_user_attr("pattern", in_words(task.budgets))


def _objectives(task: Task) -> list[str]:
    """Columns that a study makes better, both at once, so that its best trials are the front."""
    return [task.objective.key("search"), "complexity"]


def _trials(measured: Sequence[Candidate], task: Task) -> Iterator[Any]:
    chosen = {*task.options, *(key for one in measured for key in one.choices)}
    settings = [_parameters(one, task, sorted(chosen)) for one in measured]
    distributions = {key: _distribution(key, [one[key] for one in settings]) for key in settings[0]}
    began = _BEGINNING
    for number, (candidate, params) in enumerate(zip(measured, settings, strict=True)):
        ended = began + timedelta(seconds=candidate.seconds)
        row = candidate.row()
        values = [row[key] for key in _objectives(task)]
        yield _trial(number, row, values, params, distributions, (began, ended))
        began = ended


def _trial(
    number: int,
    row: dict[str, Any],
    values: list[Any],
    params: dict[str, Any],
    distributions: dict[str, Any],
    times: tuple[datetime, datetime],
) -> Any:
    from optuna.trial import FrozenTrial, TrialState

    return FrozenTrial(
        number=number,
        trial_id=number,
        state=TrialState.COMPLETE,
        value=None,
        values=values,
        params=params,
        distributions=distributions,
        user_attrs={key: row[key] for key in TOLD if row[key] is not None},
        system_attrs={},
        intermediate_values={},
        datetime_start=times[0],
        datetime_complete=times[1],
    )


def _parameters(candidate: Candidate, task: Task, chosen: Sequence[str]) -> dict[str, Any]:
    """What distinguishes a candidate from others, by the names that the dashboard shows.

    Args:
        chosen: keys of a recipe that not all candidates share.
    """
    features = {name for one in candidate.rule.formulas for name in one.features}
    recipe = task.recipe(candidate.rule, "candidate").model_dump(mode="json")
    return {
        **{key: _word(recipe[key]) for key in chosen},
        "complexity": candidate.complexity,
        "depth": candidate.criterion.depth,
        "signal": candidate.signal,
        **{f"uses {name}": name in features for name in task.space.features},
    }


def _word(value: Any) -> Any:
    """The value of a recipe key as one choice of many: Optuna takes no lists and mappings."""
    if isinstance(value, list):
        return ", ".join(str(_word(part)) for part in value)
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else value


def _distribution(key: str, values: list[Any]) -> Any:
    """Where a parameter lies, the same for all trials: Optuna compares those alone."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if key in ("complexity", "depth"):
        return IntDistribution(1, max(values))
    if key.startswith("uses "):
        return CategoricalDistribution((False, True))
    found = set(values)
    if key == "signal":
        return CategoricalDistribution([word for word in SIGNALS if word in found])
    return CategoricalDistribution(sorted(found))
