"""Where does a checkpoint stay that is written part by part, and may be gone on with after a crash?

Beside `NAME`, in `NAME.partial/`: one finished shard after the other, and a `state.json` that says
what they depend on. `NAME` itself appears complete or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from prunezero.errors import ModelError, OutputError, differences, reason
from prunezero.models.saving import check_writable
from prunezero.models.shards import Shard, StoredTensor, write_shard

# What a loader of the checkpoint needs besides weights, and the terms that it comes under.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "*token*.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
)


class UnfinishedCheckpoint:
    """A checkpoint of a known number of shards, in the making."""

    def __init__(self, output: str | Path, request: Mapping[str, Any], parts: int) -> None:
        """Begin, or go on behind the shards that an earlier run of the same request finished.

        Args:
            output: folder of the finished checkpoint, new or empty.
            request: what the content of the shards depends on; JSON data.
            parts: how many shards there will be.

        Raises:
            OutputError: the folder cannot be written, or was begun under another request, whose
                differences the message lists.
        """
        self.output = check_writable(output).absolute()
        self.folder = self.output.with_name(f"{self.output.name}.partial")
        self.model_folder = self.folder / "model"
        self.parts = parts
        with _explained(self.folder):
            self.folder.mkdir(exist_ok=True)
            self._begin(json.loads(json.dumps(request)))
            self.model_folder.mkdir(exist_ok=True)

    def _begin(self, request: dict[str, Any]) -> None:
        state = self.folder / "state.json"
        if state.is_file():
            try:
                known = json.loads(state.read_text(encoding="utf-8"))
            except ValueError:
                known = None
            if not isinstance(known, dict):
                raise OutputError(f"{state} is damaged; delete its folder and begin again")
            _refuse_other_request(known, request, self)
            return
        # A crash may have come before the state was in its place, but then nothing else is there.
        if any(path.name != "state.unfinished" for path in self.folder.iterdir()):
            raise OutputError(
                f"folder '{self.folder}' is not empty and says nothing of what it holds; move it "
                "away, or choose another output"
            )
        unfinished = self.folder / "state.unfinished"
        unfinished.write_text(json.dumps(request, indent=2), encoding="utf-8")
        os.replace(unfinished, state)

    def part(self, place: int) -> Shard:
        """A shard, counted from 0; its file exists once it is complete."""
        name = f"model-{place + 1:05}-of-{self.parts:05}.safetensors"
        return Shard(self.model_folder / name)

    def finished(self) -> int:
        """How many shards are complete, from the first on; a damaged one is made anew."""
        return next((place for place in range(self.parts) if not self._has(place)), self.parts)

    def _has(self, place: int) -> bool:
        if not self.part(place).path.is_file():
            return False
        try:
            self.part(place).tensors()
        except ModelError:
            return False
        return True

    def write(self, place: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a shard; it is complete or not there.

        Raises:
            OutputError: it cannot be written; those before are intact.
        """
        write_shard(self.part(place).path, tensors)

    def complete(self, companions: Path) -> Path:
        """Add the index and all that is no weight; the folder is then a checkpoint.

        Args:
            companions: the folder whose configuration, tokenizer and licence are copied.

        Raises:
            OutputError: a file cannot be written.
        """
        with _explained(self.folder):
            stored: dict[str, StoredTensor] = {}
            for place in range(self.parts):
                stored |= self.part(place).tensors()
            index = {
                "metadata": {"total_size": sum(tensor.bytes for tensor in stored.values())},
                "weight_map": {name: tensor.file for name, tensor in sorted(stored.items())},
            }
            for pattern in COMPANIONS:
                for path in filter(Path.is_file, companions.glob(pattern)):
                    shutil.copyfile(path, self.model_folder / path.name)
        self.add_files({"model.safetensors.index.json": json.dumps(index, indent=2) + "\n"})
        return self.model_folder

    def add_files(self, texts: Mapping[str, str]) -> None:
        """Put text files beside the shards, by file name; those that are there are replaced.

        Raises:
            OutputError: one cannot be written.
        """
        with _explained(self.folder):
            for name, text in texts.items():
                (self.model_folder / name).write_text(text, encoding="utf-8")

    def publish(self) -> Path:
        """Give the completed folder its name, and remove the traces of the work.

        Raises:
            OutputError: the folder cannot be renamed.
        """
        with _explained(self.output):
            # Of shards whose writing was killed: ours, and those of the library that writes them.
            for leftover in self.model_folder.glob(".*"):
                leftover.unlink()
            if self.output.exists():
                self.output.rmdir()
            os.replace(self.model_folder, self.output)
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.output


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise OutputError(
            f"folder '{folder}' cannot be written or read ({reason(error, folder)})"
        ) from error


def _refuse_other_request(
    before: dict[str, Any], now: dict[str, Any], checkpoint: UnfinishedCheckpoint
) -> None:
    changed = differences(before, now)
    if changed:
        raise OutputError(
            f"folder '{checkpoint.folder}' was begun under another request ({changed}); "
            "repeat that one to go on with it, delete the folder to start anew, or choose another "
            "output"
        )
