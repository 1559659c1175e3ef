"""Where does a checkpoint stay that is written part by part, and may be gone on with after a crash?

Beside `NAME`, in `NAME.partial/`: the files in the making, with the room that they will need, a
`state.json` that says what they depend on, and how many parts of them are finished. `NAME` itself
appears complete or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from prunezero.errors import OutputError, differences, reason
from prunezero.files.atomic import replace_text
from prunezero.models.loading.shards import Shards
from prunezero.models.saving.companions import copy_companions
from prunezero.models.saving.mirror import Mirror
from prunezero.models.saving.own_class import write_class_files
from prunezero.models.saving.save import check_writable

# The file that holds the number of finished parts.
FINISHED = "finished"


class ResumableCheckpoint:
    """A mirror of a checkpoint with other numbers, in the making."""

    def __init__(self, output: str | Path, request: Mapping[str, Any], source: Shards) -> None:
        """Begin, or go on behind the parts that an earlier run of the same request finished.

        Args:
            output: folder of the finished checkpoint, new or empty.
            request: what the content of the files depends on; JSON data.
            source: whose files are mirrored.

        Raises:
            OutputError: the folder cannot be written, or was begun under another request, whose
                differences the message lists.
        """
        self.output = check_writable(output).absolute()
        self.folder = self.output.with_name(f"{self.output.name}.partial")
        self.model_folder = self.folder / "model"
        self._mirror = Mirror(source, self.model_folder)
        with _explained(self.folder):
            self.folder.mkdir(exist_ok=True)
            self._begin(json.loads(json.dumps(request)))
            if not self._mirror.is_begun():
                (self.folder / FINISHED).unlink(missing_ok=True)

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

    def shards(self) -> Shards:
        """The files in the making; what is not finished in them is zero.

        Raises:
            ModelError: they are not begun, or damaged.
        """
        return Shards(self.model_folder)

    def finished(self) -> int:
        """How many parts are finished, from the first on."""
        try:
            return int((self.folder / FINISHED).read_text())
        except (OSError, ValueError):
            return 0

    def copy(self, names: Iterable[str]) -> None:
        """Begin the files with the first part: tensors of the source as they are.

        Raises:
            OutputError: they cannot be written, or the disk is too small for all parts.
        """
        with _explained(self.folder):
            shutil.rmtree(self.model_folder, ignore_errors=True)
            self.model_folder.mkdir()
        self._mirror.begin()
        for name in names:
            self._mirror.copy(name)
        self._finish(0)

    def write(self, place: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Put the tensors of a part in their places; it is finished, or made again after a crash.

        Args:
            place: of the part, counted from 0, which is what `copy` makes.
            tensors: with their names in the source, in the shape and dtype that they have there.

        Raises:
            OutputError: they cannot be written; the parts before are intact.
        """
        for name, tensor in tensors:
            self._mirror.write(name, tensor)
        self._finish(place)

    def _finish(self, place: int) -> None:
        self._mirror.sync()
        with _explained(self.folder):
            replace_text(str(place + 1), self.folder / FINISHED)

    def complete(self, companions: Path, *, ours: Collection[str] = ()) -> Path:
        """Add all that is no weight; the folder is then a checkpoint.

        Args:
            companions: the folder whose configuration, tokenizer and licence are copied.
            ours: names of files that will be added, see `copy_companions`.

        Raises:
            OutputError: a file cannot be written.
        """
        with _explained(self.folder):
            copy_companions(companions, self.model_folder, ours=ours)
            write_class_files(self.model_folder)
        return self.model_folder

    def add_files(self, texts: Mapping[str, str]) -> None:
        """Put text files beside the weights, by file name; those that are there are replaced.

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
            # Of files whose writing was killed.
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
    before: dict[str, Any], now: dict[str, Any], checkpoint: ResumableCheckpoint
) -> None:
    changed = differences(before, now)
    if changed:
        raise OutputError(
            f"folder '{checkpoint.folder}' was begun under another request ({changed}); "
            "repeat that one to go on with it, delete the folder to start anew, or choose another "
            "output"
        )
