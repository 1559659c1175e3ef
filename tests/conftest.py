"""What every test needs: one thread, a cache of its own, and no network.

With pytest-xdist, as in `make test`, files are shared out among processes (see `Makefile`).
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

# Tiny matrices gain nothing from threads, and all lose by them where other processes run: neither
# this process nor one that it starts has more.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Workers begin with these, so that none is alone with a long file at the end.
LONGEST = [
    "test_demo.py",
    "searching/test_workers.py",
    "searching/test_killed.py",
    "searching/test_search.py",
    "searching/test_testbeds.py",
    "searching/test_strategies.py",
    "cli/test_readme.py",
    "cli/test_leaving.py",
    "scoring/test_kernel_compile.py",
]
TESTS = Path(__file__).parent


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where files are shared out, the longest come first."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        places = {TESTS / name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path, len(places)))


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def pytest_collection_finish() -> None:
    """Libraries and tests live to the end: no garbage collection has to look at them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_cache(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics of one test never serve another; tests of the demo model share theirs."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("PRUNEZERO_CACHE", str(tmp_path / "cache"))
