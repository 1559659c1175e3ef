"""Prompts that hold an answer: what is asked for stands in them, and is told by its very tokens."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch
from torch import Tensor

from prunezero.formula.criterion import Criterion
from prunezero.models.attending.continuing import continued, dense_measures, read_densely
from prunezero.models.attending.policy import Policy
from prunezero.models.attending.probes import clozes, needles
from prunezero.models.loading.language_model import LanguageModel
from tests.tiny_attention import sharp_model

PROMPT, LENGTH = 192, 240


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return sharp_model(max_position_embeddings=320)


def windows_of(model: LanguageModel, count: int = 4) -> Tensor:
    rng = random.Random(3)
    words = ["".join(rng.choices("abcdef", k=rng.randint(2, 6))) for _ in range(30)]
    texts = ["".join(f" {rng.choice(words)}" for _ in range(90))[:LENGTH] for _ in range(count)]
    return torch.tensor([model.tokenizer(one)["input_ids"] for one in texts])


def text_of(model: LanguageModel, ids: Tensor) -> str:
    return "".join(model.tokenizer.convert_ids_to_tokens(ids.tolist()))


@pytest.mark.parametrize("keys", [1, 4])
def test_a_needle_asks_for_a_number_that_its_prompt_tells_once(
    keys: int, model: LanguageModel
) -> None:
    windows = windows_of(model)
    probes = needles(windows, model, prompt=PROMPT, keys=keys)
    asked, depths = [], []
    for probe, window in zip(probes, windows, strict=True):
        text = text_of(model, probe.ids)
        prompt, question = text[:PROMPT], text[PROMPT : PROMPT + probe.given]
        sentences = re.findall(r" The secret number of (\w+) is (\d{5})\.", prompt)
        assert len(sentences) == keys and len(dict(sentences)) == keys
        place = re.fullmatch(r" The secret number of (\w+) is", question)
        assert place is not None
        assert text[PROMPT + probe.given :] == f" {dict(sentences)[place[1]]}"
        # All else is the window as it was.
        rest = re.sub(r" The secret number of \w+ is \d{5}\.", "", prompt)
        assert text_of(model, window).startswith(rest)
        asked.append([name for name, _ in sentences].index(place[1]))
        depths.append(prompt.index(" The secret"))
    assert asked == ([0, 0, 0, 0] if keys == 1 else [0, 1, 2, 3])
    assert keys > 1 or (depths == sorted(depths) and depths[-1] - depths[0] > 90)
    assert not needles(windows, model, prompt=30, keys=keys)


def test_a_cloze_asks_for_the_last_word_that_stood_in_the_prompt(model: LanguageModel) -> None:
    windows = windows_of(model)
    probes = clozes(windows, model, prompt=PROMPT)
    assert len(probes) == len(windows)
    for probe, window in zip(probes, windows, strict=True):
        whole, text = text_of(model, window), text_of(model, probe.ids)
        before = {word for word in whole[:PROMPT].split()[:-1] if len(word) >= 4}
        # The first and the last word may be cut.
        later = [one for one in re.finditer(r" (\w+)(?= )", whole) if one.start() > PROMPT]
        last = [one for one in later if one[1] in before][-1]
        assert text == whole[: last.end()] and probe.given == last.start() - PROMPT
    nothing = torch.full((1, LENGTH), int(windows[0, 0]))
    assert not clozes(nothing, model, prompt=PROMPT)


def test_an_answer_counts_where_every_token_of_it_is_the_likeliest(model: LanguageModel) -> None:
    probes = needles(windows_of(model), model, prompt=PROMPT, keys=1)
    with torch.no_grad():
        logits = [model.model(probe.ids[None], use_cache=False).logits[0] for probe in probes]
    likely = [one.argmax(-1) for one in logits]
    # The model answers one of them, once its answer is what it says.
    ids = probes[1].ids.clone()
    ids[PROMPT + probes[1].given] = likely[1][PROMPT + probes[1].given - 1]
    right = ids[: PROMPT + probes[1].given + 1]
    every = [probes[0].ids, right]
    text = read_densely(model, every, prompt=PROMPT, skipped=[probe.given for probe in probes[:2]])
    found = dense_measures(model, text)
    assert found["answered"] == 0.5
    losses = []
    for ids, probe in zip(every, probes, strict=False):
        with torch.no_grad():
            chances = model.model(ids[None], use_cache=False).logits[0].double().log_softmax(-1)
        places = range(PROMPT + probe.given - 1, len(ids) - 1)
        losses.append(-sum(float(chances[at, ids[at + 1]]) for at in places) / len(places))
    assert found["window_losses"] == pytest.approx(losses, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / 2), rel=1e-5)


def test_kl_by_position_adds_up_to_the_whole(model: LanguageModel) -> None:
    windows = windows_of(model, 2)
    policy = Policy(Criterion.parse("AGE"), 0.3)
    text = read_densely(model, windows, prompt=PROMPT)
    found = continued(model, policy, text, {}).measures
    # 47 tokens are predicted: 15, 16 and 16 of them.
    parts = [
        found[f"kl_{word}"] * count for word, count in (("early", 15), ("middle", 16), ("late", 16))
    ]
    assert found["kl"] == pytest.approx(sum(parts) / 47, rel=1e-9) and min(parts) > 0
    # The first third by itself is the KL of windows that end there.
    short = read_densely(model, windows[:, : PROMPT + 16], prompt=PROMPT)
    early = continued(model, policy, short, {}).measures["kl"]
    assert found["kl_early"] == pytest.approx(early, rel=1e-4)
