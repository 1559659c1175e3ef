"""search.json: what a search was asked to do, from which it goes on and is checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prunezero.errors import PruneZeroError, SearchError, differences, reason
from prunezero.files.atomic import write_json
from prunezero.models.anatomy.patterns import patterns_of
from prunezero.pruning.recipes.documents import fault_in_words
from prunezero.searching.evaluation.journal import read_journal
from prunezero.searching.experiment.budgets import read_budgets
from prunezero.searching.experiment.config import OPEN, SearchConfig
from prunezero.searching.experiment.provenance import config_of
from prunezero.searching.spaces.space import SearchSpace

FILE = "search.json"
# Options that may be left to the machine, and so contradict nothing.
_LEFT_OPEN = ("dtype", "device")
# Options that may name a file.
_PLACES = ("model", "text")


def continued(before: SearchConfig, typed: Mapping[str, Any], folder: Path) -> SearchConfig:
    """The experiment of a search that goes on: the same, in the place of what was not typed.

    Args:
        typed: options that were typed this time, by the fields of `SearchConfig`.

    Raises:
        SearchError: an option that was typed says otherwise; the message gives both values.
    """
    told = [_contradiction(before, key, value) for key, value in typed.items()]
    if any(told):
        raise SearchError(
            f"{folder} was searched under other options ({'; '.join(filter(None, told))}); leave "
            "those out to go on, or start anew under another --name"
        )
    moved: dict[str, Any] = {
        key: _found(getattr(before, key), typed[key]) for key in _PLACES if key in typed
    }
    if "also_model" in typed:
        moved["also_model"] = tuple(map(_found, before.also_model, typed["also_model"]))
    if typed.get("device", OPEN) != OPEN:
        moved["device"] = typed["device"]
    return before.model_copy(update=moved)


def _found(was: str, now: str) -> str:
    """Where a model or text is: where it was, unless it is there no more."""
    return was if os.path.exists(was) else now


def _contradiction(before: SearchConfig, key: str, value: Any) -> str:
    """Both values of an option that was typed and asks for something else; else nothing."""
    was = getattr(before, key)
    option = f"--{key.replace('_', '-')}"
    told = f"{option} {was}, now {value}"
    if key in _PLACES:
        return "" if _is_same_place(was, value) else told
    if key == "also_model":
        is_same = len(was) == len(value) and all(map(_is_same_place, was, value))
        return "" if is_same else f"{option} {_listed(was)}, now {_listed(value)}"
    if key == "start_from":
        return "" if was == tuple(value) else f"{option} {_listed(was)}, now {_listed(value)}"
    if key == "space":
        return _other_space(before, SearchSpace.load(value, signals=before.signals), told)
    if key in ("targets", "ignore"):
        return "" if patterns_of(value) == was else _words_now(option, was, value)
    if key == "also":
        is_same = read_budgets(value) == read_budgets(",".join(was))
        return "" if is_same else _words_now(option, was, value)
    if key == "device":
        # Which of several GPUs it is changes no result.
        was, value = was.partition(":")[0], value.partition(":")[0]
    return "" if value == was or (key in _LEFT_OPEN and value == OPEN) else told


def _other_space(before: SearchConfig, now: SearchSpace, told: str) -> str:
    """What another search space has otherwise; nothing where it is the same."""
    if now == before.space_content:
        return ""
    if now.name != before.space_content.name:
        return told
    was = before.space_content.model_dump(mode="json")
    return differences(was, now.model_dump(mode="json"))


def _words_now(option: str, was: Sequence[str], now: str) -> str:
    return f"{option} {','.join(was) or 'nothing'}, now {now or 'nothing'}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names) or "nothing"


def _is_same_place(was: str, now: str) -> bool:
    """Whether it is the same; of one that was moved the journal knows the fingerprint."""
    if was == now:
        return True
    if not os.path.exists(was):
        return os.path.exists(now) and Path(was).name == Path(now).name
    return os.path.exists(now) and os.path.samefile(was, now)


def write_config(config: SearchConfig, folder: Path) -> None:
    """Write `search.json`, whole or not at all.

    Raises:
        OutputError: the folder cannot be written.
    """
    told = {"prunezero": version("prunezero"), **config.model_dump(mode="json")}
    write_json(told, folder / FILE)


def forget_config(folder: Path) -> None:
    """Take `search.json` away where no search has begun, and the folder if nothing is left."""
    if not (folder / "journal.jsonl").exists():
        with suppress(OSError):
            (folder / FILE).unlink(missing_ok=True)
            folder.rmdir()


def read_config(folder: Path) -> SearchConfig | None:
    """The experiment of the search in a folder; None where no `search.json` tells.

    Raises:
        SearchError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        # One that was written before there were several budgets, models or draws lacks those.
        return SearchConfig.model_validate_json(path.read_bytes())
    except (OSError, ValidationError, PruneZeroError) as error:
        raise SearchError(
            f"{path} cannot be read ({_in_words(error)}); take it away, and type the options of "
            "the search"
        ) from error


def headed(folder: Path) -> SearchConfig | None:
    """The experiment that heads the journal in a folder, where no `search.json` tells it."""
    with suppress(PruneZeroError, LookupError, ValueError):
        return config_of(read_journal(folder / "journal.jsonl")[0]["header"])
    return None


def _in_words(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return f"{type(error).__name__}: {reason(error)}"
    fault = error.errors()[0]
    where = ".".join(map(str, fault["loc"]))
    return f"{where and where + ': '}{fault_in_words(fault)}"
