"""Kernels run in Triton's interpreter where there is no GPU, and always in a folder of the test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Triton decides when it is first imported, so this stands before any test of this folder.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def kernels_of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
