"""What was a search asked to do? `search.json`, from which it goes on and is checked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prunezero.errors import SearchError, differences
from prunezero.files.atomic import write_json
from prunezero.formula.criterion import Criterion
from prunezero.formula.features import SIGNALS
from prunezero.models.anatomy.patterns import patterns_of
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.testbed import Testbed
from prunezero.searching.experiment.budgets import read_budgets
from prunezero.searching.experiment.task import Rule, Task
from prunezero.searching.session import make_task
from prunezero.searching.spaces.space import SearchSpace

FILE = "search.json"
# A value that leaves the choice to the machine, and so contradicts none; and who takes it.
OPEN = "auto"
_LEFT_OPEN = ("dtype", "device")
# Options that may name a file.
_PLACES = ("model", "text")


@dataclass(frozen=True)
class Asked:
    """The options of a search that its results depend on, called as its command calls them."""

    model: str
    """as `load_model` takes it"""
    text: str
    """as `load_text` takes it"""
    space: str
    """name or path of the search space"""
    sparsity: float | None
    """fraction of the weights to remove; None where the pattern says it"""
    pattern: str
    """free or N:M"""
    seed: int
    """of every draw"""
    from_scratch: bool
    """whether it starts without published formulas"""
    strategy: str
    """who proposes rules"""
    sequence_length: int
    """tokens in a window"""
    calibration_tokens: int
    """tokens that statistics are made from"""
    evaluation_tokens: int
    """tokens of search and of validation text"""
    test_tokens: int
    """tokens of test text"""
    dtype: str
    """of the weights"""
    device: str
    """where the model is"""
    space_content: Mapping[str, Any]
    """of the search space, as JSON"""
    also: str = ""
    """other regimes, with commas between them"""
    also_model: tuple[str, ...] = ()
    """further models, as `load_model` takes them"""
    draws: int = 1
    """of calibration text that rules have to be good on"""
    targets: str = ""
    """layers to prune, by pattern, with commas between them"""
    ignore: str = ""
    """layers to leave alone, likewise"""
    signals: str = SIGNALS[-1]
    """the dearest that a rule may look at, as `space_content` has it"""
    start_from: tuple[str, ...] = ()
    """searches and recipes whose rules it starts from"""
    start: tuple[Mapping[str, Any], ...] = ()
    """those rules as they were then: `formula` and `choices`"""

    def task(self) -> Task:
        """What the search looks for.

        Raises:
            PruneZeroError: options that contradict each other, or unknown words.
        """
        space = validated(SearchSpace, dict(self.space_content), f"search space {self.space}")
        return make_task(
            space,
            self.sparsity,
            pattern=self.pattern,
            also=self.also,
            seed=self.seed,
            draws=self.draws,
            start=[Rule(Criterion.parse(one["formula"]), one["choices"]) for one in self.start],
            from_scratch=self.from_scratch,
            strategy=self.strategy,
            targets=patterns_of(self.targets),
            ignore=patterns_of(self.ignore),
        )

    def settled(self, testbed: Testbed, task: Task) -> Asked:
        """The same without what was left to the machine and to the pattern."""
        loaded = testbed.language_model
        device = loaded.device.type if self.device == OPEN else self.device
        also = ",".join(budget.word for budget in task.also)
        return replace(
            self, dtype=loaded.dtype_word, device=device, sparsity=task.sparsity, also=also
        )


# What options lead to, which nobody types.
_CONTENTS = ("space_content", "start")
OPTIONS = tuple(field.name for field in fields(Asked) if field.name not in _CONTENTS)
_LISTS = ("also_model", "start_from", "start")


def asked_for(options: Mapping[str, Any], start: Sequence[Rule] = ()) -> Asked:
    """What a new search is asked to do.

    Args:
        options: a value for each of OPTIONS that has no usual one; others are left out. Signals
            stand in for those of the space.
        start: the rules that `start_from` leads to.

    Raises:
        RecipeError: no such search space, faults in its file, or nothing left under these signals.
    """
    space = SearchSpace.load(options["space"], signals=options.get("signals"))
    content = space.model_dump(mode="json")
    begun = [{"formula": one.criterion.text, "choices": dict(one.choices)} for one in start]
    found = {"signals": space.signals, "space_content": content, "start": begun}
    return _asked({**options, **found})


def goes_on(before: Asked, typed: Mapping[str, Any], folder: Path) -> Asked:
    """What a search is asked to do that goes on: the same, in the place of what was not typed.

    Args:
        typed: options that were typed this time; keys outside OPTIONS are left out.

    Raises:
        SearchError: an option that was typed says otherwise; the message gives both values.
    """
    now = {key: value for key, value in typed.items() if key in OPTIONS}
    told = [_contradiction(before, key, value) for key, value in now.items()]
    if any(told):
        raise SearchError(
            f"{folder} was searched under other options ({'; '.join(filter(None, told))}); leave "
            "those out to go on, or start anew under another --name"
        )
    moved: dict[str, Any] = {
        key: _found(getattr(before, key), now[key]) for key in _PLACES if key in now
    }
    if "also_model" in now:
        moved["also_model"] = tuple(map(_found, before.also_model, now["also_model"]))
    if now.get("device", OPEN) != OPEN:
        moved["device"] = now["device"]
    return replace(before, **moved)


def _found(was: str, now: str) -> str:
    """Where a model or text is: where it was, unless it is there no more."""
    return was if os.path.exists(was) else now


def _asked(options: Mapping[str, Any]) -> Asked:
    """The options, whose lists came from the command line or from JSON."""
    known = {field.name: options[field.name] for field in fields(Asked) if field.name in options}
    return Asked(**known | {key: tuple(known.get(key) or ()) for key in _LISTS})


def _check_types(asked: Asked) -> None:
    """Refuse values of other types than the fields have.

    Raises:
        ValueError: names the first.
    """
    for field in fields(Asked):
        value = getattr(asked, field.name)
        if not _HOLDS[str(field.type)](value):
            raise ValueError(f"{field.name} is {value!r:.40}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rule(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("formula"), str)
        and isinstance(value.get("choices"), dict)
    )


# What a field of each type may hold.
_HOLDS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "int": _is_whole,
    "float | None": lambda value: value is None or isinstance(value, float) or _is_whole(value),
    "Mapping[str, Any]": lambda value: isinstance(value, dict),
    "tuple[str, ...]": lambda value: all(isinstance(one, str) for one in value),
    "tuple[Mapping[str, Any], ...]": lambda value: all(map(_is_rule, value)),
}


def _contradiction(before: Asked, key: str, value: Any) -> str:
    """Both values of an option that was typed and asks for something else; else nothing."""
    was = getattr(before, key)
    told = f"--{key.replace('_', '-')} {was}, now {value}"
    if key in _PLACES:
        return "" if _is_same_place(was, value) else told
    if key == "start_from":
        return "" if was == tuple(value) else f"--start-from {_listed(was)}, now {_listed(value)}"
    if key == "also_model":
        is_same = len(was) == len(value) and all(map(_is_same_place, was, value))
        return "" if is_same else f"--also-model {_listed(was)}, now {_listed(value)}"
    if key == "space":
        content = SearchSpace.load(value, signals=before.signals).model_dump(mode="json")
        if content["name"] == before.space_content["name"]:
            told = differences(before.space_content, content)
        return "" if content == before.space_content else told
    if key in ("targets", "ignore"):
        return "" if patterns_of(value) == patterns_of(was) else told
    if key == "also":
        return "" if read_budgets(value) == read_budgets(was) else told
    if key == "device":
        # Which of several GPUs it is changes no result.
        was, value = was.partition(":")[0], value.partition(":")[0]
    return "" if value == was or (key in _LEFT_OPEN and value == OPEN) else told


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names) or "nothing"


def _is_same_place(was: str, now: str) -> bool:
    """Whether it is the same; of one that was moved the journal knows the fingerprint."""
    if was == now:
        return True
    if not os.path.exists(was):
        return os.path.exists(now) and Path(was).name == Path(now).name
    return os.path.exists(now) and os.path.samefile(was, now)


def write_asked(asked: Asked, folder: Path) -> None:
    """Write `search.json`, whole or not at all.

    Raises:
        OutputError: the folder cannot be written.
    """
    write_json({"prunezero": version("prunezero"), **asdict(asked)}, folder / FILE)


def forget_asked(folder: Path) -> None:
    """Take `search.json` away where no search has begun, and the folder if nothing is left."""
    if not (folder / "journal.jsonl").exists():
        with suppress(OSError):
            (folder / FILE).unlink(missing_ok=True)
            folder.rmdir()


def read_asked(folder: Path) -> Asked | None:
    """What the search in a folder was asked to do; None where no `search.json` tells.

    Raises:
        SearchError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text())
        # One that was written before there were several regimes, models or draws lacks those.
        found = _asked(data)
        _check_types(found)
        return found
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise SearchError(
            f"{path} cannot be read ({type(error).__name__}: {error}); take it away, and type the "
            "options of the search"
        ) from error
