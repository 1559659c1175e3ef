"""The best of every family: once each, on its island, and no longer than it is young."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prunezero.formula import Criterion
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.task import Rule, Task
from prunezero.searching.history import History
from prunezero.searching.search import _Run
from prunezero.searching.spaces.space import SearchSpace
from prunezero.searching.strategies.evolution import Proposal, Strategy, without_state
from tests.searching.test_strategies import SPACE, PlantedRungs


def history_of(*rows: tuple[str, int, float]) -> History:
    """Candidates by formula, generation and layer error, with slots in this order."""
    history = History()
    for text, generation, error in rows:
        slot = history.slot
        formula = Criterion.parse(text)
        fields: Any = {"mask": str(slot), "layer_error": error}
        history.keep(Candidate(slot, generation, formula, "random", (), "new", **fields))
        history.slot += 1
    return history


def slots(candidates: Sequence[Candidate]) -> list[int]:
    return [one.slot for one in candidates]


def test_a_population_holds_the_best_of_each_skeleton_on_its_island() -> None:
    history = history_of(
        ("abs(W)*X**0.5", 0, 0.3),
        ("abs(W)*X**0.7", 0, 0.1),
        ("abs(W)*G**0.5", 0, 0.2),
        ("abs(W)*X**0.6", 0, 0.2),
        ("abs(W)*Y", 0, 0.4),
    )
    assert slots(history.population(9)) == [1, 2, 4]
    assert slots(history.population(2)) == [1, 2]
    assert slots(history.population(9, island=(0, 2))) == [2, 0, 4]
    assert slots(history.population(9, island=(1, 2))) == [1]


def test_places_of_those_that_are_too_old_go_to_younger_ones() -> None:
    history = history_of(
        ("abs(W)*X", 0, 0.1), ("abs(W)*G", 0, 0.2), ("abs(W)*Y", 9, 0.3), ("abs(W)*D", 5, 0.4)
    )
    assert slots(history.population(2)) == [0, 1]
    assert slots(history.population(2, oldest=5)) == [2, 3]
    assert slots(history.population(2, oldest=6)) == [2]


def test_a_skeleton_is_as_old_as_its_best_numbers() -> None:
    history = history_of(("abs(W)*X**0.5", 0, 0.2), ("abs(W)*X**0.6", 9, 0.3), ("abs(W)*G", 9, 0.4))
    assert slots(history.population(2, oldest=5)) == [2]
    better = history_of(("abs(W)*X**0.5", 0, 0.2), ("abs(W)*X**0.6", 9, 0.1))
    assert slots(better.population(2, oldest=5)) == [1]


class Tuning(PlantedRungs):
    """Remembers for which rules numbers were asked."""

    def __init__(self, space: SearchSpace, pattern: str = "free") -> None:
        super().__init__(space=space)
        self.task = Task(space, 0.5, pattern, 0, ())
        self.tuned: list[Rule] = []

    def tunings(self, rules: Sequence[Rule], trials: int) -> Iterator[dict[str, Any]]:
        self.tuned += rules
        return super().tunings(rules, trials)


def tuned(*choices: dict[str, str], pattern: str = "free") -> list[str]:
    """Who competed when numbers were asked for one formula, which was found with these choices."""
    fields = {"tuned": 2, "generation": 1, "compare": "row"}
    rungs: Any = Tuning(SearchSpace.model_validate({**SPACE.model_dump(), **fields}), pattern)
    rules = [
        Rule(Criterion.parse(f"abs(W)*X**0.{5 + place}"), one) for place, one in enumerate(choices)
    ]

    def propose(task: Task, history: History, generation: int) -> Iterator[Proposal]:
        if generation < len(rules):
            yield Proposal(rules[generation], "seed")

    run = _Run(rungs, History(forgets_masks=True), Strategy(without_state(propose), ""), bool)
    for generation in range(len(rules)):
        assert list(run.generation(generation, None))
    return [str(rule.choices.get("compare", "row")) for rule in rungs.tuned]


def test_a_skeleton_is_tuned_once_for_each_group_that_may_compete() -> None:
    model, row = {"compare": "model"}, {"compare": "row"}
    assert tuned({}, model, {}, model) == ["row", "model"]
    # the same group, by its name and by default
    assert tuned({}, row) == ["row"]
    # inside a pattern nothing else competes, whatever a rule says
    assert len(tuned({}, model, pattern="2:4")) == 1
