"""Stages of a pruning, kept on disk: where it stopped, and what the weights were then.

A folder holds the request and the layers' weights after the last finished stage. The stages of
step k are "pruned" and "tuned"; a tuning keeps its own state in the same folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from prunezero.errors import OutputError, differences, reason
from prunezero.files.atomic import replace_text
from prunezero.files.digests import file_digest
from prunezero.models.anatomy.linears import Linear
from prunezero.models.loading.shards import write_shard

STAGES = ("pruned", "tuned")


class Stages:
    """The finished stages of one request, on disk; without a folder nothing is kept."""

    def __init__(
        self,
        folder: Path | None,
        request: dict[str, Any],
        layers: Sequence[Linear],
        *,
        keeps_weights: bool = True,
    ) -> None:
        """Open or make the folder, and bring back the weights of the last finished stage.

        Args:
            folder: new, or that of the same request.
            request: whatever the weights follow from, as plain JSON.
            layers: all whose weights or biases may change.
            keeps_weights: whether a finished stage is behind us after a stop; otherwise all are
                done anew, and trainings, whose files stay, are taken up from those.

        Raises:
            OutputError: the folder is of another request, is damaged, or cannot be written.
        """
        self._folder = folder
        self._layers = layers
        self._keeps_weights = keeps_weights
        self._finished = (-1, "")
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._open(folder, request)
        except OSError as error:
            raise OutputError(
                f"folder '{folder}' cannot be written ({reason(error, folder)})"
            ) from error

    def _open(self, folder: Path, request: dict[str, Any]) -> None:
        path = folder / "request.json"
        if not path.is_file():
            replace_text(json.dumps({"request": request}), path)
            return
        try:
            known = json.loads(path.read_text())
            step, stage = known.get("finished", (-1, ""))
            changed = differences(known["request"], request)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{path} is damaged ({reason(error, path)}); delete its folder"
            ) from error
        if changed:
            raise OutputError(
                f"'{folder}' holds an unfinished run of another request ({changed}); finish that "
                "one with its own options, or delete the folder"
            )
        if stage:
            self._restore(folder / f"step-{step}-{stage}.safetensors", known.get("digest"))
        self._finished = (step, stage)

    def has(self, step: int, stage: str) -> bool:
        """Whether a stage, one of `STAGES`, is behind us."""
        done_step, done_stage = self._finished
        return step < done_step or (step == done_step and stage in STAGES[: _place(done_stage)])

    def keep(self, step: int, stage: str) -> None:
        """Note that a stage is finished, with the weights as they are now.

        Raises:
            OutputError: they cannot be written.
        """
        if self._folder is None or not self._keeps_weights:
            self._finished = (step, stage)
            return
        path = self._folder / f"step-{step}-{stage}.safetensors"
        tensors = {key: value.contiguous().cpu().clone() for key, value in self._tensors()}
        write_shard(path, tensors)
        try:
            request = json.loads((self._folder / "request.json").read_text())
            finished = request | {"finished": [step, stage], "digest": file_digest(path)}
            replace_text(json.dumps(finished), self._folder / "request.json")
            self._finished = (step, stage)
            used_up = [old for old in self._folder.glob("step-*") if old != path]
            tuning = self.checkpoint(step)
            if stage == "tuned" and tuning is not None and tuning.exists():
                used_up.append(tuning)
            for old in used_up:
                old.unlink()
        except OSError as error:
            raise OutputError(f"'{path}' cannot be written ({reason(error, path)})") from error

    def checkpoint(self, step: int) -> Path | None:
        """The file in which the tuning of a step keeps its state."""
        return None if self._folder is None else self._folder / f"tuning-{step}.pt"

    def _tensors(self) -> list[tuple[str, Tensor]]:
        found = [(f"{layer.name}.weight", layer.weight) for layer in self._layers]
        biases = [(f"{layer.name}.bias", layer.bias) for layer in self._layers]
        return found + [(name, bias) for name, bias in biases if bias is not None]

    def _restore(self, path: Path, digest: str | None) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            # A flipped bit would be a wrong weight that nobody sees.
            if file_digest(path) != digest:
                raise ValueError("it is not what was written")
            kept = load_file(path)
            for name, tensor in self._tensors():
                tensor.copy_(kept[name])
        except (OSError, SafetensorError, ValueError, LookupError, RuntimeError) as error:
            raise OutputError(
                f"'{path}' is damaged ({reason(error, path)}); delete its folder"
            ) from error


def _place(stage: str) -> int:
    return STAGES.index(stage) + 1 if stage in STAGES else 0
