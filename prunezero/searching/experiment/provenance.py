"""Provenance: what the answer to a request depends on, beside the request.

Journals are refused, archived answers left aside and workers sent home where it differs.
"""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prunezero.errors import PruneZeroError, SearchError, TextError, reason
from prunezero.files.digests import file_digest, joined_digest
from prunezero.files.machine import graphics, processor
from prunezero.formula.code import steps
from prunezero.formula.vocabulary import OPERATORS
from prunezero.models.text.splits import SPLITS
from prunezero.models.text.windows import windows_fingerprint
from prunezero.pruning.testbed import Testbed
from prunezero.searching.experiment.config import SearchConfig
from prunezero.searching.experiment.task import Task
from prunezero.searching.proxies.samples import ROW_WEIGHTS, rung_sums
from prunezero.searching.spaces.space import SearchSpace

# Counts changes to what a search draws, asks or writes; what is older is then refused.
FORMAT = 8
# Whoever has a hand in the numbers of an answer, or in what a search draws.
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "sympy", "optuna")
# The floors of this package that answers come from.
_FLOORS = ("files", "formula", "scoring", "models", "pruning", "searching")


def conditions(config: SearchConfig, testbeds: Sequence[Testbed]) -> dict[str, Any]:
    """Everything beside a request that its answer depends on, as JSON.

    Args:
        testbeds: of all models of the search, its own first.
    """
    return fingerprints(config, testbeds) | config.answered_under()


def fingerprints(config: SearchConfig, testbeds: Sequence[Testbed]) -> dict[str, Any]:
    """What the names of a search lead to (models, text, packages), as JSON."""
    testbed, *others = testbeds
    space = config.space_content
    sums = rung_sums(space.features, with_gradients=space.weighted_by_gradient, unit=space.unit)
    return {
        **_surroundings(testbed),
        "format": FORMAT,
        "weighted_rows": ROW_WEIGHTS in sums,
        **further_models(others),
        **further_draws(testbeds, config.draws),
        **_plugged(config),
    }


def header(task: Task, testbeds: Sequence[Testbed]) -> dict[str, Any]:
    """What heads the journal of a search: its experiment, and fingerprints beside it, as JSON."""
    written = {"seeds": [rule.text for rule in task.seeds]}
    # Journals began before there were these, and a damaged header is known by its text.
    unsaid = {"objective"} if task.objective.is_usual else set()
    unsaid |= set() if task.config.stop_early else {"stop_early"}
    return {
        "config": task.config.model_dump(mode="json", exclude=unsaid),
        "fingerprints": fingerprints(task.config, testbeds) | written,
    }


def comparable(header: Mapping[str, Any]) -> dict[str, Any]:
    """Everything in a header that a search depends on, on one level; names of places are left out.

    Raises:
        SearchError: it is no header of a search.
    """
    try:
        if "config" not in header:
            return _older(header)
        config = config_of(header)
        return header["fingerprints"] | config.answered_under() | config.decided_by()
    except (PruneZeroError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise SearchError(
            "it was searched by another version of prunezero, or its journal was changed "
            f"({type(error).__name__}: {reason(error)})"
        ) from error


def config_of(header: Mapping[str, Any]) -> SearchConfig:
    """The experiment that heads a journal.

    Raises:
        ValueError: it is none.
    """
    return SearchConfig.model_validate_json(json.dumps(header["config"]))


def _older(header: Mapping[str, Any]) -> dict[str, Any]:
    """A header of the time when it was on one level already, under other words."""
    found = dict(header)
    if "space" in found:
        found["space"] = SearchSpace.model_validate(found["space"]).decides()
    # What a search is compared with decides nothing of how it goes.
    found.pop("rivals", None)
    return found


def header_digest(header: Mapping[str, Any]) -> str:
    """Hexadecimal digits that are equal for searches that cannot differ."""
    whole = comparable(header) if "config" in header else header
    return joined_digest([json.dumps(whole, sort_keys=True)])


def surroundings(testbed: Testbed) -> dict[str, Any]:
    """What any number that is measured on a testbed depends on, whatever is asked, as JSON."""
    return _surroundings(testbed) | {"settings": vars(testbed.settings).copy()}


def _surroundings(testbed: Testbed) -> dict[str, Any]:
    return {
        "prunezero": version("prunezero"),
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: version(name) for name in LIBRARIES},
        **_kernels(testbed),
        **subject(testbed),
    }


def subject(testbed: Testbed) -> dict[str, str]:
    """The model and text of a testbed, as they are and not as they are called."""
    model = testbed.language_model
    return {
        "model": model.fingerprint,
        "dtype": str(model.dtype),
        "device": model.device.type,
        "text": testbed.text.fingerprint,
        # The vocabulary does not tell how a text becomes tokens, nor the text how it is cut.
        **{f"{split} token ids": _ids(testbed, split) for split in SPLITS},
    }


def machine(testbed: Testbed, threads: int) -> dict[str, Any]:
    """What the last bits of an answer depend on, and the code that it comes from.

    An answer of another search that differs in a last bit would let this one end otherwise than
    without it, so the archive keeps them apart. A search itself may go on elsewhere.

    Args:
        threads: of each evaluator.
    """
    device = testbed.language_model.device
    return {
        "threads": threads,
        "processor": processor(),
        **graphics(device),
        "matmul": torch.get_float32_matmul_precision(),
        "code": _own_code(),
    }


@lru_cache(maxsize=1)
def _own_code() -> str:
    return digest_of_code(Path(__file__).parents[2])


def digest_of_code(package: Path) -> str:
    """Hexadecimal digest of the source of all floors that answers come from."""
    files = sorted(path for floor in _FLOORS for path in (package / floor).rglob("*.py"))
    return joined_digest(f"{path.relative_to(package)} {file_digest(path)}" for path in files)


def _ids(testbed: Testbed, split: str) -> str:
    try:
        return windows_fingerprint(testbed.windows(split))
    except TextError:
        # Whoever needs the split says so; a comparison does without that of searches.
        return "too short"


def further_models(also_testbeds: Sequence[Testbed]) -> dict[str, list[Any]]:
    """Fingerprints, dtypes and token ids of further models, where there are any."""
    if not also_testbeds:
        return {}
    models = [testbed.language_model for testbed in also_testbeds]
    return {
        "also_models": [model.fingerprint for model in models],
        "also_dtypes": [str(model.dtype) for model in models],
        "also_token_ids": [[_ids(testbed, split) for split in SPLITS] for testbed in also_testbeds],
    }


def further_draws(testbeds: Sequence[Testbed], draws: int) -> dict[str, list[str]]:
    """Token ids of further draws of calibration text, where there are any."""
    drawn = [testbed.drawn(draw) for testbed in testbeds for draw in range(1, draws)]
    return {"drawn_token_ids": [_ids(testbed, "calibration") for testbed in drawn]} if drawn else {}


def _kernels(testbed: Testbed) -> dict[str, str]:
    """Which Triton computes scores on a GPU; kernels and torch differ in last bits."""
    if testbed.language_model.device.type == "cpu":
        return {}
    has_triton = importlib.util.find_spec("triton") is not None
    return {"triton": version("triton") if has_triton else "none"}


def _plugged(config: SearchConfig) -> dict[str, str]:
    """What operators of other packages mean that this search may use."""
    space = config.space_content
    written = [*space.terminals, *(rule.criterion for rule in config.rules)]
    inside = {step.operator.name for criterion in written for step in steps(criterion)}
    words = inside.union(space.operators) - set(OPERATORS.own)
    meanings = OPERATORS.plugged() if words else {}
    return {f"operator {word}": meanings[word] for word in sorted(words & set(meanings))}
