"""Which token windows may a model be run on, and how are they cut from documents?"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from prunezero.errors import TextError
from prunezero.models.loading.language_model import LanguageModel

# Whatever a tokenizer puts around a text, it puts around this one.
PROBE = "The text goes on."


def first_tokens(tokenizer: Any) -> list[int]:
    """Ids of the tokens that a tokenizer by itself begins a text with; most begin with none.

    What it ends a text with does not count.
    """
    bare = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    whole = tokenizer(PROBE)["input_ids"]
    places = range(len(whole) - len(bare) + 1)
    place = next((place for place in places if whole[place : place + len(bare)] == bare), 0)
    return list(whole[:place])


def begin_with(tokenizer: Any) -> str:
    """The tokens of `first_tokens` in words, such as "<bos>"; empty where there are none."""
    return " ".join(tokenizer.convert_ids_to_tokens(first_tokens(tokenizer)))


def check_windows(ids: Tensor, language_model: LanguageModel) -> None:
    """Refuse token windows that the model cannot be run on, before any work.

    Args:
        ids: [count, length], int64.
        language_model: whose positions and vocabulary count.

    Raises:
        TextError: no windows, fewer than 2 or too many tokens in each, or ids outside the
            vocabulary.
    """
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise TextError(
            f"token windows must be int64 of shape [count, length] but are {ids.dtype} of shape "
            f"{list(ids.shape)}"
        )
    count, length = ids.shape
    if count < 1:
        raise TextError("there is no text to run the model on: 0 windows; ask for at least 1")
    if length < 2:
        raise TextError(
            f"a window of {length} tokens has no next token to predict; use a length of at least 2"
        )
    check_length(length, language_model)
    vocabulary = int(language_model.model.get_input_embeddings().weight.shape[0])
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise TextError(
            f"token id {wrong} is outside the vocabulary of '{language_model.name}' (0 to "
            f"{vocabulary - 1}); the tokenizer belongs to another model"
        )


def windows_fingerprint(windows: Tensor) -> str:
    """Hexadecimal digest of token ids, and their shape: the same text cut otherwise is another."""
    ids = windows.cpu().contiguous().numpy().tobytes()
    return f"{hashlib.blake2b(ids, digest_size=16).hexdigest()} {list(windows.shape)}"


def check_length(length: int, language_model: LanguageModel) -> None:
    """Refuse windows longer than the positions that the model was built for.

    Raises:
        TextError: names both numbers.
    """
    longest = getattr(language_model.model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and longest > 0 and length > longest:
        raise TextError(
            f"windows of {length} tokens are longer than the {longest} positions that "
            f"'{language_model.name}' supports; use a length of at most {longest}"
        )
