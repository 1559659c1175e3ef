"""What every test needs: one thread, a cache of its own, and no network."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Tiny matrices gain nothing from threads, and lose hundredfold where other processes run.
torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def pytest_collection_finish() -> None:
    """Libraries and tests live to the end: no garbage collection has to look at them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_cache(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Statistics of one test never serve another; tests of the demo model share theirs."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("PRUNEZERO_CACHE", str(tmp_path / "cache"))
        yield
        return
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)
