"""A policy in a model's attention: exact where all stays, causal, and gone without a trace."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from prunezero.errors import ModelError, PruneZeroError, SelectionError
from prunezero.formula.criterion import Criterion
from prunezero.models.attending.installing import evicting, masking
from prunezero.models.attending.interface import Call, watched_attention
from prunezero.models.attending.observing import (
    Looks,
    next_attention,
    query_moments,
    reread_attention,
)
from prunezero.models.attending.policy import Policy
from prunezero.models.attending.remembering import bytes_held
from prunezero.models.loading.language_model import LanguageModel
from tests.tiny_attention import other_model, sharp_model
from tests.tiny_models import tiny_batches

PROMPT, MORE = 24, 8
IDS = tiny_batches(2, PROMPT + MORE)
LOOKS = Looks(window=4, pool=3, lag=4)
FORMULAS = (
    *("-AGE", "ATT_W", "ATT_SUM", "ATT_MEAN", "ATT_LAST", "ATT_MAX", "-KN", "VN", "KDEV"),
    *("(EXPECTED + 0.01) * VN", "(ATT_W + 0.0001) * VON", "LAGK + LAGV", "RNDK"),
)
MODELS = {
    **{name: partial(sharp_model, name) for name in ("llama", "qwen3", "gpt2", "opt", "gemma3")},
    **{name: partial(sharp_model, name) for name in ("phi3", "gpt_neox")},
    **{name: partial(other_model, name) for name in ("qwen2", "gemma2")},
}


def policy(text: str = "ATT_W", kept: float = 0.5, **numbers: Any) -> Policy:
    numbers = {"sinks": 2, "recent": 4, "looks": LOOKS, **numbers}
    return Policy(Criterion.parse(text), kept, **numbers)


def known_of(model: LanguageModel, text: str) -> dict[int, Any]:
    return query_moments(model, IDS, PROMPT) if "EXPECTED" in text else {}


def read_on(
    model: LanguageModel, cache: Any, ids: Tensor, *, prompt: int = PROMPT, step: int = 1
) -> Tensor:
    """Logits of a prompt and of what follows it, so many tokens at a time."""
    with torch.no_grad():
        parts = [ids[:, :prompt], *torch.split(ids[:, prompt:], step, 1)]
        return torch.cat([model.model(part, cache=cache).logits for part in parts], 1)


def usual(model: LanguageModel, ids: Tensor, **numbers: Any) -> Tensor:
    from transformers import DynamicCache

    return read_on(model, DynamicCache(config=model.model.config), ids, **numbers)


@pytest.mark.parametrize("family", sorted(MODELS))
def test_a_policy_that_keeps_all_is_the_librarys_attention(family: str) -> None:
    model = MODELS[family]()
    for step in (1, MORE):
        wanted = usual(model, IDS, step=step)
        with evicting(model, policy(kept=1.0)) as cache:
            assert torch.equal(read_on(model, cache, IDS, step=step), wanted)
        with masking(model, policy(kept=1.0)) as cache:
            assert float((read_on(model, cache, IDS, step=step) - wanted).abs().max()) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
@pytest.mark.parametrize("each_step", [False, True])
def test_forgetting_is_masking_step_by_step(family: str, each_step: bool) -> None:
    longer = {"n_positions": 160} if family == "gpt2" else {"max_position_embeddings": 160}
    model = sharp_model(family, **longer)
    ids = tiny_batches(1, 64 + 64, seed=5)
    for text in ("ATT_W", "ATT_SUM", "-KN") if family == "llama" else ("ATT_SUM",):
        chosen = policy(text, 0.25, each_step=each_step)
        with evicting(model, chosen) as cache:
            forgotten = read_on(model, cache, ids, prompt=64)
            full = [layer for layer in cache.layers if not layer.is_sliding]
            held = [layer.keys.shape[2] for layer in full]
            assert held == [16 if each_step else 16 + 64] * len(full)
            assert [layer.get_seq_length() for layer in full] == [128] * len(full)
        with masking(model, chosen) as cache:
            masked = read_on(model, cache, ids, prompt=64)
        assert float((forgotten - masked).abs().max()) < 1e-5
        assert float((forgotten - usual(model, ids, prompt=64))[:, 64:].abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3", "gpt_neox", "qwen3"])
def test_other_layouts_forget_what_masks_would_hide(family: str) -> None:
    model = MODELS[family]()
    for step in (1, MORE):
        with evicting(model, policy()) as cache:
            forgotten = read_on(model, cache, IDS, step=step)
        with masking(model, policy()) as cache:
            assert float((read_on(model, cache, IDS, step=step) - forgotten).abs().max()) < 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("text", FORMULAS)
def test_a_token_changes_nothing_before_it(text: str, implementation: str) -> None:
    model = sharp_model("llama", attn_implementation=implementation)
    known = known_of(model, text)
    for way in (evicting, masking):
        with way(model, policy(text), known) as cache:
            before = read_on(model, cache, IDS, step=MORE)
        for place in (PROMPT - 1, PROMPT, PROMPT + 5, PROMPT + MORE - 1):
            other = IDS.clone()
            other[:, place:] = (other[:, place:] + 7) % 90 + 3
            with way(model, policy(text), known) as cache:
                after = read_on(model, cache, other, step=MORE)
            assert torch.equal(after[:, :place], before[:, :place])
            assert not torch.equal(after[:, place:], before[:, place:])


def test_a_missing_mask_twin_would_be_seen() -> None:
    # The check above can fail: attention without the model's masks tells tokens of later ones.
    model = sharp_model("llama", attn_implementation="eager")

    def unmasked(call: Call) -> tuple[Tensor, Tensor | None]:
        return replace(call, mask=None).usual()

    other = IDS.clone()
    other[:, -1] = (other[:, -1] + 7) % 90 + 3
    with watched_attention(model, unmasked):
        found = [usual(model, ids, prompt=len(ids[0]) - 1, step=1) for ids in (IDS, other)]
        whole = [model.model(ids, use_cache=False).logits for ids in (IDS, other)]
    assert torch.equal(found[0][:, :PROMPT], found[1][:, :PROMPT])
    assert not torch.equal(whole[0][:, :PROMPT], whole[1][:, :PROMPT])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", FORMULAS)
def test_a_padded_text_is_read_as_it_would_be_alone(side: str, text: str) -> None:
    model = sharp_model("llama")
    known, short = known_of(model, text), 5
    mask = torch.ones(2, PROMPT + MORE, dtype=torch.long)
    padding = slice(0, short) if side == "left" else slice(PROMPT - short, PROMPT)
    mask[1, padding] = 0
    ids = IDS.clone()
    ids[1, padding] = 2
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), masking(model, policy(text), known) as cache:
        run = partial(model.model, cache=cache)
        run(ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], position_ids=positions[:, :PROMPT])
        found = run(ids[:, PROMPT:], attention_mask=mask, position_ids=positions[:, PROMPT:]).logits
    for row in range(2):
        alone = ids[row : row + 1, mask[row].bool()]
        with evicting(model, policy(text), known) as cache:
            prompt = PROMPT - short * row
            wanted = read_on(model, cache, alone, prompt=prompt, step=MORE)[:, prompt:]
        if text == "RNDK" or row == 0 or "EXPECTED" not in text:
            assert float((found[row] - wanted[0]).abs().max()) < 1e-5, (side, row)


def test_generation_goes_on_at_the_right_places_with_fewer_bytes() -> None:
    model = sharp_model("llama", max_position_embeddings=160)
    prompt = tiny_batches(1, 48)
    wanted = model.model.generate(prompt, max_new_tokens=12, do_sample=False)
    with evicting(model, policy(kept=1.0)) as cache:
        found = model.model.generate(prompt, cache=cache, max_new_tokens=12, do_sample=False)
        assert torch.equal(found, wanted)
        whole = bytes_held(cache)
        cache.reset()
        assert bytes_held(cache) == 0
    with evicting(model, policy(kept=0.25)) as cache:
        found = model.model.generate(prompt, cache=cache, max_new_tokens=12, do_sample=False)
        # The last token that is drawn is not read any more.
        assert cache.get_seq_length() == 48 + 11 and found.shape == (1, 60)
        # Two layers, keys and values, two heads of eight float32 channels.
        assert bytes_held(cache) == 2 * 2 * 2 * 8 * 4 * (12 + 11)
        assert whole == 2 * 2 * 2 * 8 * 4 * (48 + 11)


def test_layers_with_a_window_of_their_own_are_left_alone() -> None:
    model = sharp_model("gemma3")
    with torch.no_grad(), evicting(model, policy()) as cache:
        model.model(IDS[:1, :PROMPT], cache=cache)
        assert [layer.keys.shape[2] for layer in cache.layers] == [7, PROMPT // 2]


def test_heads_that_compete_keep_unequal_numbers_by_masks_alone() -> None:
    model = sharp_model("llama")
    together = policy(together=True, safeguard=0.0)
    assert together.is_simulated and not policy().is_simulated
    with pytest.raises(SelectionError, match="unequal numbers of keys"), evicting(model, together):
        pass
    with torch.no_grad(), masking(model, together) as cache:
        whole = read_on(model, cache, IDS)
        assert bytes_held(cache) == 2 * 2 * 2 * 2 * 8 * 4 * (PROMPT + MORE)
    with masking(model, policy()) as cache:
        assert not torch.equal(read_on(model, cache, IDS), whole)


def test_all_heads_of_a_layer_may_keep_the_same_keys() -> None:
    model = sharp_model("llama")
    with torch.no_grad(), evicting(model, policy("KN", share="layer")) as cache:
        model.model(IDS[:1, :PROMPT], cache=cache)
        shared = [layer.keys for layer in cache.layers]
    from transformers import DynamicCache

    dense = DynamicCache(config=model.model.config)
    with torch.no_grad():
        model.model(IDS[:1, :PROMPT], cache=dense)
    for keys, layer in zip(shared, dense.layers, strict=True):
        norms = layer.keys[0].double().norm(dim=-1).mean(0)
        places = [*range(2), *range(PROMPT - 4, PROMPT)]
        free = sorted(range(2, PROMPT - 4), key=lambda place: float(norms[place]))[-6:]
        assert torch.equal(keys[0], layer.keys[0][:, sorted([*places, *free])])


def test_leaving_it_leaves_no_trace_also_after_an_error() -> None:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    model = sharp_model("llama")
    registered = [dict(one._global_mapping) for one in (AttentionInterface, AttentionMaskInterface)]
    state = {key: value.clone() for key, value in model.model.state_dict().items()}
    before = usual(model, IDS)
    for way in (evicting, masking):
        with pytest.raises(ZeroDivisionError), way(model, policy("VON")) as cache:
            read_on(model, cache, IDS)
            raise ZeroDivisionError
        assert model.model.config._attn_implementation == "sdpa"
    after = [dict(one._global_mapping) for one in (AttentionInterface, AttentionMaskInterface)]
    assert after == registered
    assert all(torch.equal(value, state[key]) for key, value in model.model.state_dict().items())
    assert torch.equal(usual(model, IDS), before)


def test_attention_that_is_yet_to_come_is_what_later_tokens_pay() -> None:
    model = sharp_model("llama", attn_implementation="eager")
    with torch.no_grad():
        maps = model.model(IDS[:1], output_attentions=True).attentions
    found = next_attention(model, IDS[0], PROMPT)
    for layer, attention in enumerate(maps):
        wanted = attention[0].view(2, 2, PROMPT + MORE, -1).mean(1)[:, PROMPT:, :PROMPT].sum(1)
        value = found[layer].next_attention
        assert value is not None
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


def test_attention_of_a_text_read_once_more_is_the_most_that_a_query_pays() -> None:
    model = sharp_model("llama", attn_implementation="eager")
    ids = IDS[0, :PROMPT]
    with torch.no_grad():
        maps = model.model(ids.repeat(2)[None], output_attentions=True).attentions
    found = reread_attention(model, ids)
    for layer, attention in enumerate(maps):
        wanted = attention[0].view(2, 2, 2 * PROMPT, -1)[:, :, PROMPT:, :PROMPT].amax((1, 2))
        value = found[layer].reread_attention
        assert value is not None
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(PruneZeroError, match="66 tokens are longer than the 64 positions"):
        reread_attention(model, tiny_batches(1, 33)[0])


def test_query_moments_are_those_of_the_places_behind_a_prompt() -> None:
    model = sharp_model("llama")
    seen: dict[int, list[Tensor]] = {}

    def note(call: Call) -> tuple[Tensor, Tensor | None]:
        seen.setdefault(call.layer, []).append(call.queries[:, :, PROMPT:].double())
        return call.usual()

    with torch.no_grad(), watched_attention(model, note):
        model.model(IDS)
    for layer, known in query_moments(model, IDS, PROMPT).items():
        rows = torch.cat(seen[layer]).transpose(0, 1).flatten(1, 2)
        for head, own in enumerate(rows):
            assert known.query_mean is not None and known.query_covariance is not None
            torch.testing.assert_close(
                known.query_mean[head].double(), own.mean(0), rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                known.query_covariance[head].double(), own.T.cov(correction=0), rtol=1e-4, atol=1e-4
            )
    with pytest.raises(ModelError, match="say nothing of queries behind a prompt of 32"):
        query_moments(model, IDS, PROMPT + MORE)


def _with_another_cache(model: LanguageModel, cache: Any) -> None:
    from transformers import StaticCache

    model.model(IDS, cache=StaticCache(config=model.model.config, max_cache_len=64))


def _without_cache(model: LanguageModel, cache: Any) -> None:
    model.model(IDS, use_cache=False)


def _padded(model: LanguageModel, cache: Any) -> None:
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    model.model(IDS, attention_mask=mask, cache=cache)


def _beams(model: LanguageModel, cache: Any) -> None:
    model.model.generate(IDS[:1], cache=cache, max_new_tokens=3, num_beams=2)


def _several(model: LanguageModel, cache: Any) -> None:
    read_on(model, cache, IDS, step=2)


@pytest.mark.parametrize(
    ("run", "numbers", "said"),
    [
        (_with_another_cache, {}, "runs with another one or with none"),
        (_without_cache, {}, "runs with another one or with none"),
        (_padded, {}, "a padded batch has texts of unequal length, which here"),
        (_beams, {"each_step": True}, "beams and drafts exchange"),
        (_several, {"each_step": True}, "2 tokens come at once behind the prompt"),
        (_several, {"kept": 0.1}, "3 of 24 keys may stay, but 6 always do"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    run: Any, numbers: dict[str, Any], said: str
) -> None:
    model = sharp_model("llama")
    with pytest.raises(PruneZeroError, match=said), evicting(model, policy(**numbers)) as cache:
        run(model, cache)


def test_models_and_policies_that_cannot_be_are_refused() -> None:
    with (
        pytest.raises(ModelError, match="no layer of 'mistral' remembers all tokens"),
        evicting(sharp_model("mistral"), policy()),
    ):
        pass
    model = sharp_model("llama")
    with (
        evicting(model, policy()),
        pytest.raises(ModelError, match="is watched or left out in part already"),
        masking(model, policy()),
    ):
        pass
    model.model.config._attn_implementation = "flex_attention"
    with (
        pytest.raises(ModelError, match="computes attention by flex_attention"),
        evicting(model, policy()),
    ):
        pass
    with pytest.raises(SelectionError, match="ATT_NEXT is measured of a prompt"):
        policy("ATT_NEXT", each_step=True)
    with pytest.raises(SelectionError, match="compare: layer and block are two ways to choose"):
        policy(together=True, block=4)
    with (
        pytest.raises(SelectionError, match="heads compete once"),
        masking(sharp_model("llama"), policy(together=True, each_step=True)),
    ):
        pass
