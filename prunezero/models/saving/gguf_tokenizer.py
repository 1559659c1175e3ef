"""What does llama.cpp have to know of a tokenizer, as fields of a .gguf file?

A model that came as .gguf keeps the fields of its file. Of others, byte-level BPE is written whose
way to cut a text into words has a name in llama.cpp; all else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunezero.errors import ModelError

_PREFIX = "tokenizer."
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is cut, as tokenizer.json has it, by llama.cpp's name of it.
WAYS_TO_CUT: dict[str, tuple[tuple[str, Any], ...]] = {
    "gpt-2": (("ByteLevel", True),),
    "smollm": (("Digits", True), ("ByteLevel", True)),
    "llama-bpe": (("Split", _LLAMA3), ("ByteLevel", False)),
    "qwen2": (("Split", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), ("ByteLevel", False)),
}


@dataclass(frozen=True)
class Field:
    """One field of a .gguf file."""

    value: Any
    kind: str
    """its type, as the `gguf` package calls it: STRING, ARRAY, UINT32, BOOL, ..."""
    of: str = ""
    """of an array, the type of its parts"""

    def write(self, writer: Any, key: str) -> None:
        """Put it into a file that is being written."""
        from gguf import GGUFValueType

        inner = {"sub_type": GGUFValueType[self.of]} if self.of else {}
        writer.add_key_value(key, self.value, GGUFValueType[self.kind], **inner)


def tokenizer_fields(
    folder: Path, tokenizer: Any, vocabulary: int, gguf_file: Path | None = None
) -> dict[str, Field]:
    """The fields of a tokenizer, by key.

    Args:
        folder: of the model, with tokenizer.json.
        tokenizer: the transformers tokenizer of it.
        vocabulary: rows of the embedding, which may be more than words.
        gguf_file: whose fields are copied instead.

    Raises:
        ModelError: llama.cpp has no name for such a tokenizer.
    """
    if gguf_file is not None:
        return _copied(gguf_file)
    told = _settings(folder)
    words = _words(tokenizer, vocabulary)
    special = _special(told, tokenizer)
    kinds = [special.get(word, _NORMAL) if known else _UNUSED for word, known in words]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in told["model"]["merges"]]
    fields = {
        "ggml.model": Field("gpt2", "STRING"),
        "ggml.pre": Field(_way_to_cut(told, folder), "STRING"),
        "ggml.tokens": Field([word for word, _ in words], "ARRAY", "STRING"),
        "ggml.token_type": Field(kinds, "ARRAY", "INT32"),
        "ggml.merges": Field(merges, "ARRAY", "STRING"),
        "ggml.add_bos_token": Field(_begins_with_bos(tokenizer), "BOOL"),
    }
    for word in ("bos", "eos", "unknown", "padding"):
        key = {"unknown": "unk", "padding": "pad"}.get(word, word)
        index = getattr(tokenizer, f"{key}_token_id", None)
        if index is not None:
            fields[f"ggml.{word}_token_id"] = Field(int(index), "UINT32")
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        fields["chat_template"] = Field(tokenizer.chat_template, "STRING")
    return {f"{_PREFIX}{key}": field for key, field in fields.items()}


def refuse_without_fields(folder: Path, gguf_file: Path | None = None) -> None:
    """Refuse a tokenizer that cannot be written.

    Raises:
        ModelError: as `tokenizer_fields`.
    """
    if gguf_file is None:
        _way_to_cut(_settings(folder), folder)


def _copied(path: Path) -> dict[str, Field]:
    from gguf import GGUFReader

    found = {}
    for key, field in GGUFReader(path).fields.items():
        if key.startswith(_PREFIX):
            kinds = [kind.name for kind in field.types]
            found[key] = Field(field.contents(), kinds[0], kinds[1] if len(kinds) > 1 else "")
    return found


def _settings(folder: Path) -> Mapping[str, Any]:
    try:
        told = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        if isinstance(told, dict) and isinstance(told["model"]["merges"], list):
            return told
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise ModelError(
        f"'{folder}' has no byte-level BPE tokenizer in tokenizer.json, so its tokenizer cannot be "
        "written as GGUF; prune the .gguf file of the model, whose tokenizer is copied"
    )


def _way_to_cut(told: Mapping[str, Any], folder: Path) -> str:
    """llama.cpp's name for how a text is cut into words.

    Raises:
        ModelError: it has none that is known here.
    """
    cut = told.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers", [cut])
    found = tuple(_step(step) for step in steps)
    for name, way in WAYS_TO_CUT.items():
        if found == way:
            return name
    raise ModelError(
        f"the tokenizer in '{folder}' cuts text in a way for which no name of llama.cpp is known "
        f"({', '.join(str(word) for word, _ in found)}); known: {', '.join(WAYS_TO_CUT)}; prune "
        "the .gguf file of the model, whose tokenizer is copied"
    )


def _step(step: Mapping[str, Any]) -> tuple[str, Any]:
    """What one step of cutting does, as far as it matters."""
    kind = str(step.get("type"))
    about = {
        "ByteLevel": step.get("use_regex", True),
        "Digits": step.get("individual_digits"),
        "Split": (step.get("pattern") or {}).get("Regex"),
    }
    return kind, about.get(kind)


def _words(tokenizer: Any, vocabulary: int) -> list[tuple[str, bool]]:
    """The word of each row of the embedding, and whether the tokenizer has one for it."""
    by_index = {index: word for word, index in tokenizer.get_vocab().items()}
    known = [by_index.get(index) for index in range(vocabulary)]
    return [(word or f"[PAD{index}]", word is not None) for index, word in enumerate(known)]


def _special(told: Mapping[str, Any], tokenizer: Any) -> dict[str, int]:
    added = told.get("added_tokens") or []
    found = {one["content"]: _CONTROL if one["special"] else _USER_DEFINED for one in added}
    return found | dict.fromkeys(tokenizer.all_special_tokens, _CONTROL)


def _begins_with_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a").input_ids
    return len(ids) > 1 and ids[0] == tokenizer.bos_token_id
