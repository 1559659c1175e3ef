"""Prompts that hold an answer, and questions behind them: is it still found once keys went?

In `needle` a sentence tells a number of five digits somewhere in other text, in `needles` several
sentences do so of different places; behind the prompt one of them is asked for. In `cloze` a text
goes on to the last word that stood in the prompt before, which is to be told. All are cut as
tokens, so the answer is made of the very tokens that the prompt holds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.text.windows import first_tokens

PLACES = ("Paris", "London", "Rome", "Madrid", "Berlin", "Vienna", "Oslo", "Cairo")
# Sentences in a prompt of several.
SEVERAL = 4
# Letters of a word that is asked for, at least: shorter ones stand anywhere.
LETTERS = 4
# How a token begins that begins a word: a space, as tokenizers write it.
_BEGINNINGS = (" ", "Ġ", "▁")


@dataclass(frozen=True)
class Probe:
    """One prompt and its question."""

    ids: Tensor
    """token ids [length] of prompt, question and answer"""
    given: int
    """tokens behind the prompt that are the question; what follows is the answer"""


def needles(
    windows: Tensor, language_model: LanguageModel, *, prompt: int, keys: int, seed: int = 0
) -> list[Probe]:
    """One probe for each window: sentences told in its text, one of which is asked for.

    Sentences stand at equal distances; which is asked for, and with one alone where it stands,
    goes round from window to window. None where they do not fit in the prompt.

    Args:
        windows: token ids [count, length] of text, of at least `prompt` tokens.
        prompt: tokens of a prompt, sentences among them.
        keys: sentences in a prompt, 1 to 8.
        seed: of the numbers.
    """
    rng = random.Random(seed)
    begin = len(first_tokens(language_model.tokenizer))
    found = []
    for number, window in enumerate(windows.tolist()):
        told = [_sentence(place, rng, language_model) for place in rng.sample(PLACES, keys)]
        room = prompt - sum(len(question + answer + end) for question, answer, end in told)
        if room < begin + keys + 1:
            return []
        part = (number % len(windows) + 0.5) / len(windows)
        depths = [(at + (part if keys == 1 else 0.5)) / keys for at in range(keys)]
        cuts = [begin + round(depth * (room - begin)) for depth in depths]
        ids: list[int] = []
        for start, stop, sentence in zip([0, *cuts], cuts, told, strict=False):
            ids += window[start:stop] + [one for part in sentence for one in part]
        ids += window[cuts[-1] : room]
        question, answer, _ = told[number % keys]
        found.append(Probe(torch.tensor(ids + question + answer), len(question)))
    return found


def _sentence(
    place: str, rng: random.Random, language_model: LanguageModel
) -> tuple[list[int], list[int], list[int]]:
    """Token ids of a question, of its answer, and of the end of the sentence that they make."""
    number = rng.randrange(10_000, 100_000)
    texts = (f" The secret number of {place} is", f" {number}", ".")
    tokenize = language_model.tokenizer
    question, answer, end = (tokenize(one, add_special_tokens=False)["input_ids"] for one in texts)
    return list(question), list(answer), list(end)


def clozes(windows: Tensor, language_model: LanguageModel, *, prompt: int) -> list[Probe]:
    """A probe for each window in which a word behind the prompt stood in it before.

    It is the last such word of at least four letters, and the window ends with it.

    Args:
        windows: token ids [count, length], longer than `prompt`.
    """
    found = []
    for window in windows.tolist():
        pieces = language_model.tokenizer.convert_ids_to_tokens(window)
        words = list(_words(pieces))
        before = {tuple(window[start:stop]) for start, stop in words if stop <= prompt}
        asked = [
            (start, stop)
            for start, stop in words
            if start > prompt and tuple(window[start:stop]) in before
        ]
        long = [(a, b) for a, b in asked if _letters(pieces[a:b]) >= LETTERS]
        if long:
            start, stop = long[-1]
            found.append(Probe(torch.tensor(window[:stop]), start - prompt))
    return found


def _words(pieces: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Where each word begins and ends, in tokens: from a space to what is no letter."""
    start = None
    for at, piece in enumerate(pieces):
        begins = piece.startswith(_BEGINNINGS)
        if start is not None and (begins or not piece.isalpha()):
            yield start, at
            start = None
        if begins and (len(piece) == 1 or piece[1:].isalpha()):
            start = at


def _letters(pieces: Sequence[str]) -> int:
    return sum(character.isalpha() for piece in pieces for character in piece.strip("Ġ▁ "))
