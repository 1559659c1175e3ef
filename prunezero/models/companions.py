"""What stands beside the weights of a model, and how does it reach the folder of a pruned one?

Configuration, tokenizer, templates, terms: bytes as they are, for whatever opened the source is to
open the result. A library that writes them anew writes its own dialect of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
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


def copy_companions(source: Path, target: Path, *, ours: Collection[str] = ()) -> None:
    """Copy the companions of a model, bytes as they are.

    Args:
        source: folder of the model.
        target: folder of the pruned one.
        ours: names of files that are put there instead; one of the source with such a name is kept
            under that of `put_aside`.

    Raises:
        OSError: a file cannot be read or written.
    """
    names = companions(source)
    taken = {str(name) for name in names} | set(ours)
    for name in names:
        place = put_aside(name.name, taken) if str(name) in ours else str(name)
        taken.add(place)
        (target / place).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / place)


def put_aside(name: str, taken: Collection[str]) -> str:
    """Another name for a file of the source: README.source.md for README.md, if not taken."""
    stem, dot, ending = name.rpartition(".")
    places = (f"{stem}.source{count}{dot}{ending}" for count in ["", *range(2, len(taken) + 3)])
    return next(place for place in places if place not in taken)


def edit_configuration(folder: Path, changes: Mapping[str, Any], *, part: str = "") -> None:
    """Change keys of config.json, and leave all others and their order as they are.

    Args:
        changes: value by key.
        part: the key of the settings inside which they stand; the outermost ones if empty.

    Raises:
        OSError: the file cannot be read or written.
    """
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    inner = settings[part] if part else settings
    inner |= changes
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
