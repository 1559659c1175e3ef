"""How well does a model go on once its cache has forgotten a part of the prompt?

A prompt is read densely, keys leave the cache, and what follows is predicted from what is left. Two
kinds of text are asked for, since criteria that are good at one need not be at the other: `text`
goes on as it was written, which the last tokens alone mostly foretell; in `recall` the beginning of
the prompt comes again behind text of another document, which only its own keys foretell.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prunezero.errors import TextError
from prunezero.models.attending.installing import Known, installed
from prunezero.models.attending.interface import Attend, Call, watched_attention
from prunezero.models.attending.links import LinkPolicy
from prunezero.models.attending.observing import merged, next_attention, reread_attention
from prunezero.models.attending.policy import Policy
from prunezero.models.attending.remembering import bytes_held, cache_word, plain_cache
from prunezero.models.evaluation import Head, find_head, window_measures
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.measures import TO_DENSE
from prunezero.models.text.windows import check_windows, first_tokens

# KL of each third of what is predicted, in its order.
THIRDS = ("kl_early", "kl_middle", "kl_late")


@dataclass(frozen=True)
class Reading:
    """One prompt as the dense model read it, and how it goes on."""

    ids: Tensor
    """token ids [length] of the prompt and what follows"""
    calls: Mapping[int, Call]
    """what attention was called with at the prompt, by layer"""
    states: Tensor
    """final hidden states of what follows [tokens, hidden]"""
    skipped: int
    """tokens behind the prompt that are given and not predicted, at least 1: the first is predicted
    from the prompt, before anything is forgotten"""


@dataclass(frozen=True)
class Continuations:
    """Prompts and what follows them, with what the dense model makes of both."""

    readings: tuple[Reading, ...]
    """one of each window"""
    prompt: int
    """tokens of each prompt"""
    dense_bytes: int
    """of keys and values behind one prompt"""


@dataclass(frozen=True)
class Continued:
    """What a policy is worth on some continuations."""

    measures: dict[str, Any]
    """perplexity, those of `TO_DENSE`, mean nats per predicted token of each window, `answered`,
    the share of windows all of whose predicted tokens are the most likely ones, and where there are
    three tokens or more `kl_early`, `kl_middle` and `kl_late`, of a third of them each"""
    bytes_held: int
    """of keys and values behind one prompt, counted on tensors"""
    dense_bytes: int
    """the same of the dense model"""
    links: float
    """share of links that stay, of those that the dense model computes behind a prompt, or in it
    where links of the prompt alone go"""
    seconds: float
    """elapsed, without reading the prompts"""


def recall_windows(
    windows: Tensor, *, prompt: int, repeated: int, language_model: LanguageModel
) -> Tensor:
    """Windows whose first tokens come again behind a prompt that goes on with another window.

    Args:
        windows: token ids [count, length], at least 2 of them.
        prompt: tokens of a prompt.
        repeated: tokens that come again.

    Returns:
        Token ids [count, prompt + repeated].

    Raises:
        TextError: windows are too few or too short.
    """
    begin = len(first_tokens(language_model.tokenizer))
    if len(windows) < 2 or windows.shape[1] < prompt or prompt < begin + repeated:
        raise TextError(
            f"recall needs 2 windows or more of at least {prompt} tokens, and prompts longer than "
            f"the {repeated} tokens that come again, but got {list(windows.shape)}"
        )
    end = begin + repeated
    others = windows.roll(-1, 0)[:, end:prompt]
    return torch.cat([windows[:, :end], others, windows[:, begin:end]], 1)


def read_densely(
    language_model: LanguageModel,
    windows: Tensor | Sequence[Tensor],
    *,
    prompt: int,
    skipped: int | Sequence[int] = 1,
) -> Continuations:
    """What the dense model makes of prompts and of what follows them.

    Queries, keys and values of all layers stay in memory, so that every policy chooses from one
    reading; many prompts are better measured one by one.

    Args:
        windows: token ids [count, length], or [length] of each where lengths differ.
        prompt: tokens of each prompt.
        skipped: tokens behind a prompt that are not predicted, at least 1; of each, or of all.

    Raises:
        TextError: nothing is left to predict, or the model cannot be run on these ids.
        ModelError: the model has no attention that can be watched.
    """
    given = [skipped] * len(windows) if isinstance(skipped, int) else skipped
    for ids, count in zip(windows, given, strict=True):
        check_windows(ids[None], language_model)
        if not 1 <= count < len(ids) - prompt or prompt < 1:
            raise TextError(
                f"windows of {len(ids)} tokens leave nothing to predict behind a prompt of "
                f"{prompt} and {max(count, 1)} given; use longer windows, or a shorter prompt"
            )
    readings, held = [], 0
    for ids, count in zip(windows, given, strict=True):
        calls: dict[int, Call] = {}
        cache = plain_cache(language_model)
        with torch.no_grad(), watched_attention(language_model, _noting(calls)):
            _run(language_model, ids[:prompt], cache)
        held = bytes_held(cache)
        with torch.no_grad():
            states = _run(language_model, ids[prompt:], cache)
        readings.append(Reading(ids, calls, states, count))
    if not readings:
        raise TextError("there is no text to run the model on: 0 windows; ask for at least 1")
    return Continuations(tuple(readings), prompt, held)


def continued(
    language_model: LanguageModel, policy: Policy | LinkPolicy, text: Continuations, known: Known
) -> Continued:
    """What a policy is worth on continuations that the dense model has read.

    Args:
        known: what was measured beforehand; what follows is looked at where the policy asks it.

    Raises:
        SelectionError, ScoreError, StatisticsError: as `Policy.chosen`.
        ModelError: the model has no such attention.
    """
    started = time.perf_counter()
    windows = []
    held, links = 0, 1.0
    head = find_head(language_model, text.readings[0].ids[None])
    for reading in text.readings:
        seen = known
        if "ATT_NEXT" in policy.features:
            seen = merged(known, next_attention(language_model, reading.ids, text.prompt))
        if "ATT_READ" in policy.features:
            seen = merged(seen, reread_attention(language_model, reading.ids[: text.prompt]))
        states, held, links = _states(language_model, policy, reading, text.prompt, seen)
        windows.append(_window(head, states, reading, text.prompt))
    measures = {name: _mean([row[name] for row in windows]) for name in TO_DENSE}
    thirds = [key for key in THIRDS if all(key in row for row in windows)]
    measures |= {key: _mean([row[key] for row in windows]) for key in ("answered", *thirds)}
    losses = [row["loss"] for row in windows]
    measured = {"perplexity": math.exp(_mean(losses)), **measures, "window_losses": losses}
    seconds = time.perf_counter() - started
    return Continued(measured, held, text.dense_bytes, links, seconds)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@torch.no_grad()
def _window(head: Head, states: Tensor, reading: Reading, prompt: int) -> dict[str, float]:
    """Loss, `TO_DENSE`, KL by thirds and whether all is answered, of one window.

    Args:
        states: of what follows the prompt [tokens, hidden].
    """
    # The token in front of the first predicted one is what it is predicted from.
    begin = reading.skipped - 1
    ids = reading.ids[prompt + begin :].to(states.device)
    states, dense = states[begin:], reading.states[begin:]
    predicted = len(ids) - 1
    cuts = [0, *(part * predicted // 3 for part in (1, 2)), predicted]
    if predicted < len(THIRDS):
        cuts = [0, predicted]
    totals, found = [0.0] * (1 + len(TO_DENSE)), {"answered": 1.0}
    for key, start, stop in zip(THIRDS, cuts, cuts[1:], strict=False):
        places = slice(start, stop + 1)
        wanted = partial(_logits, head, dense[places])
        loss, near = window_measures(head, states[places], wanted, ids[places])
        part = [one * (stop - start) for one in (loss, *near)]
        totals = [a + b for a, b in zip(totals, part, strict=True)]
        if len(cuts) > 2:
            found[key] = near[0]
        likely = head(states[start:stop]).argmax(-1)
        found["answered"] *= float((likely == ids[start + 1 : stop + 1]).all())
    names = ("loss", *TO_DENSE)
    return found | {name: one / predicted for name, one in zip(names, totals, strict=True)}


def dense_measures(language_model: LanguageModel, text: Continuations) -> dict[str, Any]:
    """Perplexity of the dense model on continuations, `answered`, and losses of windows."""
    head = find_head(language_model, text.readings[0].ids[None])
    windows = [_window(head, one.states, one, text.prompt) for one in text.readings]
    losses = [row["loss"] for row in windows]
    answered = _mean([row["answered"] for row in windows])
    return {"perplexity": math.exp(_mean(losses)), "answered": answered, "window_losses": losses}


def _states(
    language_model: LanguageModel,
    policy: Policy | LinkPolicy,
    reading: Reading,
    prompt: int,
    known: Known,
) -> tuple[Tensor, int, float]:
    """Final hidden states of what follows [tokens, hidden], bytes before it, and share of links."""
    with torch.no_grad(), installed(language_model, policy, known) as session:
        if isinstance(policy, LinkPolicy) and policy.at_prompt:
            _run(language_model, reading.ids[:prompt], session.cache)
        else:
            session.read_again(reading.calls)
        held = bytes_held(session.cache)
        following = reading.ids[prompt:]
        parts = torch.split(following, 1 if policy.each_step else len(following))
        states = torch.cat([_run(language_model, one, session.cache) for one in parts])
    return states, held, session.links_kept / max(session.links, 1)


def _logits(head: Head, states: Tensor, places: slice) -> Tensor:
    return head(states[places])


def _noting(calls: dict[int, Call]) -> Attend:
    """What keeps the calls of attention by layer, and gives what the model gives."""

    def note(call: Call) -> tuple[Tensor, Tensor | None]:
        calls[call.layer] = call
        return call.usual()

    return note


def _run(language_model: LanguageModel, ids: Tensor, cache: Any) -> Tensor:
    body = language_model.model.base_model
    held = {cache_word(body): cache}
    found = body(ids[None].to(language_model.device), use_cache=True, **held)
    return found.last_hidden_state[0]
