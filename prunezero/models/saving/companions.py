"""What stands beside the weights of a model, and how does it reach the folder of a pruned one?

Configuration, tokenizer, templates, terms: bytes as they are, for whatever opened the source is to
open the result. A library that writes them anew writes its own dialect of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

# By their names in small letters: what loaders read beside weights, and the terms of the model.
COMPANIONS = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "*.vocab",
    "*.md",
    "recipe.yaml",
    "*tokenizer*",
    "*vocab*",
    "merges.txt",
    "*licen[cs]e*",
    "copying*",
    "notice*",
    "*policy*",
)
# Indices of weights belong to their files; the rest are weights, code and archives.
_NOT = (
    "*.index.json",
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.py",
    "*.zip",
    "*.gz",
)
# Transformers keeps templates besides the first one in a folder.
_TEMPLATES = "additional_chat_templates"


def companions(folder: Path) -> list[Path]:
    """The files of a model's folder that are no weights, as paths inside it."""
    found = [path for path in folder.iterdir() if path.is_file() and _is_companion(path.name)]
    found += (folder / _TEMPLATES).glob("*.jinja")
    return sorted(path.relative_to(folder) for path in found)


def _is_companion(name: str) -> bool:
    word = name.lower()
    if word.startswith(".") or any(fnmatchcase(word, pattern) for pattern in _NOT):
        return False
    return any(fnmatchcase(word, pattern) for pattern in COMPANIONS)


def places_of_companions(folder: Path, *, ours: Collection[str] = ()) -> dict[str, str]:
    """Where the companions of a model go in another folder, by their paths in this one.

    Args:
        ours: names of files that are put there instead: `README.md` of the source is kept as
            `README.source.md`, or as the first of `README.source2.md` ... that is not taken.
    """
    names = [path.as_posix() for path in companions(folder)]
    places = {name: name for name in names if name not in ours}
    for name in names:
        if name in ours:
            taken = {*places.values(), *names, *ours}
            places[name] = next(other for other in _other_names(name) if other not in taken)
    return places


def _other_names(name: str) -> Iterator[str]:
    path = PurePosixPath(name)
    yield str(path.with_name(f"{path.stem}.source{path.suffix}"))
    yield from (
        str(path.with_name(f"{path.stem}.source{number}{path.suffix}")) for number in count(2)
    )


def copy_companions(source: Path, target: Path, *, ours: Collection[str] = ()) -> None:
    """Copy the companions of a model, bytes as they are.

    Args:
        source: folder of the model.
        target: folder of the pruned one.
        ours: see `places_of_companions`.

    Raises:
        OSError: a file cannot be read or written.
    """
    for name, place in places_of_companions(source, ours=ours).items():
        (target / place).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / place)


def edit_configuration(
    folder: Path, changes: Mapping[str, Any], *, part: str = "", name: str = "config.json"
) -> None:
    """Change keys of a JSON file of settings, and leave all others and their order as they are.

    Args:
        changes: value by key.
        part: the key of the settings inside which they stand; the outermost ones if empty.
        name: of the file.

    Raises:
        OSError: the file cannot be read or written.
    """
    path = folder / name
    settings = json.loads(path.read_text(encoding="utf-8"))
    inner = settings[part] if part else settings
    inner |= changes
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
