from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from prunezero.errors import ModelError, TextError
from prunezero.models import evaluation
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.evaluation import count_sparsity, dense_reference, evaluate
from prunezero.models.loading.load import wrap_model
from prunezero.models.measures import SHARES, TO_DENSE
from prunezero.models.saving.save import save_model
from tests.tiny_models import FAMILIES, tiny_batches, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("chunk", [512, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_and_divergence_equal_those_of_whole_logits(
    family: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "CHUNK", chunk)
    model, ids = tiny_model(family), tiny_batches(3, 24)
    reference = dense_reference(model, ids)
    with torch.no_grad():
        dense = model.model(ids).logits[:, :-1].log_softmax(-1)
        find_linears(model.model)[-1].weight.mul_(-30.0)
        pruned = model.model(ids).logits[:, :-1].log_softmax(-1)
    measured = evaluate(model, ids, reference=reference)
    losses = [cross_entropy(p, i[1:]).item() for p, i in zip(pruned, ids, strict=True)]
    assert measured.window_losses == pytest.approx(losses, rel=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    expected = kl_div(pruned, dense, log_target=True, reduction="none").sum(-1).mean().item()
    assert measured.kl == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert measured.kl is not None and measured.kl > 0
    assert measured.tokens == 3 * 23
    assert measured.seconds > 0


def test_capped_logits_are_measured_as_the_model_computes_them() -> None:
    model, ids = tiny_model("gemma3", final_logit_softcapping=0.05), tiny_batches(2, 24)
    reference = dense_reference(model, ids)
    with torch.no_grad():
        logits = model.model(ids).logits
        assert float(logits.abs().max()) < 0.05
        loss = cross_entropy(logits[:, :-1].reshape(-1, 97), ids[:, 1:].reshape(-1))
    measured = evaluate(model, ids, reference=reference)
    assert measured.perplexity == pytest.approx(math.exp(loss.item()), rel=1e-6)
    assert measured.kl == 0.0
    assert evaluate(model, ids).kl is None


def test_a_model_that_narrows_its_hidden_states_itself_is_measured_in_bfloat16() -> None:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}
    configuration = Mamba2Config(vocab_size=97, hidden_size=32, num_hidden_layers=2, **sizes)
    network = Mamba2ForCausalLM(configuration).to(torch.bfloat16)
    model, ids = wrap_model(network, tiny_tokenizer(), name="mamba2"), tiny_batches(2, 24)
    with torch.no_grad():
        logits = network(ids).logits.float()
    loss = cross_entropy(logits[:, :-1].reshape(-1, 97), ids[:, 1:].reshape(-1))
    assert evaluate(model, ids).perplexity == pytest.approx(math.exp(loss.item()), rel=1e-3)


def test_a_model_that_blew_up_has_no_perplexity() -> None:
    model, ids = tiny_model(), tiny_batches()
    find_linears(model.model)[0].weight.fill_(float("nan"))
    measured = evaluate(model, ids)
    assert math.isnan(measured.perplexity)
    assert all(map(math.isnan, measured.window_losses))


def test_each_window_is_measured_by_itself() -> None:
    model, ids = tiny_model(), tiny_batches(3)
    together = evaluate(model, ids).window_losses
    assert together == tuple(evaluate(model, one[None]).window_losses[0] for one in ids)


def test_text_that_the_model_cannot_take_is_refused() -> None:
    for measure in (evaluate, dense_reference):
        with pytest.raises(TextError, match="65 tokens are longer than the 64"):
            measure(tiny_model(), tiny_batches(1, 65))


def test_a_reference_of_other_windows_is_refused_with_both_shapes() -> None:
    model = tiny_model()
    reference = dense_reference(model, tiny_batches(2))
    with pytest.raises(ModelError, match=r"\[2, 16\] .* \[4, 16\]"):
        evaluate(model, tiny_batches(4), reference=reference)


@pytest.mark.parametrize("changes", [{}, {"final_logit_softcapping": 0.5}])
def test_the_dense_answers_come_from_the_dense_head_when_the_model_gets_another(
    changes: dict[str, Any],
) -> None:
    family = "gemma3" if changes else "llama"
    model, ids = tiny_model(family, tie_word_embeddings=False, **changes), tiny_batches(2, 24)
    reference = dense_reference(model, ids)
    with torch.no_grad():
        dense = model.model(ids).logits[:, :-1].log_softmax(-1)
        other = model.model.lm_head.weight.flip(0)
        model.model.lm_head.weight = nn.Parameter(other, requires_grad=False)
        pruned = model.model(ids).logits[:, :-1].log_softmax(-1)
    measured = evaluate(model, ids, reference=reference)
    expected = kl_div(pruned, dense, log_target=True, reduction="none").sum(-1).mean().item()
    assert expected > 1e-4 and measured.kl == pytest.approx(expected, rel=1e-3)
    assert torch.equal(model.model.lm_head.weight, other)


def test_a_head_that_was_written_to_is_refused_for_it_would_measure_against_itself() -> None:
    model, ids = tiny_model(), tiny_batches()
    reference = dense_reference(model, ids)
    assert evaluate(model, ids, reference=reference).kl == 0.0
    model.model.get_output_embeddings().weight.detach()[0] = 1.0
    with pytest.raises(ModelError, match="the output head was written to"):
        evaluate(model, ids, reference=reference)


@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_are_counted_in_the_saved_files(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    layers = find_linears(model.model)
    names = [layer.name for layer in layers]
    layers[0].weight[:, 1::2] = -0.0
    layers[1].weight[:3] = 0.0
    save_model(model, tmp_path / "saved")
    counted = count_sparsity(tmp_path / "saved", names)
    expected = layers[0].weight.numel() // 2 + 3 * layers[1].weight.shape[1]
    assert (counted.zeros, counted.negative_zeros) == (expected, 0)
    assert counted.total == sum(layer.weight.numel() for layer in layers)
    assert counted.sparsity == expected / counted.total


def test_zeros_are_counted_across_several_files_and_negative_ones_are_named(tmp_path: Path) -> None:
    model = tiny_model()
    layer = find_linears(model.model)[-1]
    layer.weight[0] = -0.0
    model.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    counted = count_sparsity(tmp_path, [layer.name])
    assert (counted.zeros, counted.negative_zeros) == (64, 64)


def test_a_folder_without_a_model_a_damaged_file_and_a_missing_layer_are_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(ModelError, match="model.safetensors is missing"):
        count_sparsity(tmp_path, ["a"])
    save_model(tiny_model(), tmp_path / "saved")
    with pytest.raises(ModelError, match="has no weight 'a.weight'"):
        count_sparsity(tmp_path / "saved", ["a"])
    file = tmp_path / "saved" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="is damaged"):
        count_sparsity(tmp_path / "saved", ["a"])


def loop_over_tokens(dense: Tensor, pruned: Tensor) -> dict[str, list[float]]:
    """Each of `TO_DENSE` for every token, from logits [tokens, vocabulary], one word at a time."""
    found: dict[str, list[float]] = {key: [] for key in TO_DENSE}
    for wanted, given in zip(dense.double().tolist(), pruned.double().tolist(), strict=True):
        p, q = ([math.exp(one) for one in logits] for logits in (wanted, given))
        p, q = ([one / math.fsum(chances) for one in chances] for chances in (p, q))
        choice = min(range(len(p)), key=lambda word: (-wanted[word], word))
        order = sorted(range(len(q)), key=lambda word: (-given[word], word))
        both = list(zip(p, q, strict=True))
        found["kl"].append(math.fsum(one * math.log(one / other) for one, other in both))
        found["top1_agreement"].append(float(order[0] == choice))
        found["top5_agreement"].append(float(choice in order[:5]))
        found["acceptance"].append(math.fsum(min(one, other) for one, other in both))
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_agreement_and_acceptance_are_what_a_loop_over_tokens_and_words_finds(family: str) -> None:
    model, ids = tiny_model(family), tiny_batches(3, 40)
    reference = dense_reference(model, ids)
    with torch.no_grad():
        dense = model.model(ids).logits[:, :-1]
        for layer in find_linears(model.model)[::2]:
            layer.weight.mul_(-4.0)
        pruned = model.model(ids).logits[:, :-1]
    measured = evaluate(model, ids, reference=reference)
    slow = [loop_over_tokens(*pair) for pair in zip(dense, pruned, strict=True)]
    for key in TO_DENSE:
        expected = [math.fsum(one[key]) / 39 for one in slow]
        assert measured.windows[key] == pytest.approx(expected, rel=1e-4, abs=1e-7)
        assert getattr(measured, key) == pytest.approx(math.fsum(expected) / 3, rel=1e-4)
    top1, top5, accepted = (getattr(measured, key) for key in SHARES)
    assert top1 < top5 < 1 and 0.1 < accepted < 0.99


def test_of_equally_likely_tokens_the_first_of_the_vocabulary_is_the_likelier() -> None:
    # Whole numbers, of which many are equal; seven that share the first place; all alike.
    drawn = torch.Generator().manual_seed(0)
    dense = torch.randint(0, 4, (200, 12), generator=drawn).float()
    pruned = torch.randint(0, 4, (200, 12), generator=drawn).float()
    pruned[:20] = torch.tensor([0.0] * 5 + [1.0] * 7)
    pruned[20:30] = 2.0
    slow = loop_over_tokens(dense, pruned)
    _, *found = evaluation.token_measures(pruned, dense, torch.zeros(200, dtype=torch.int64))
    sums = [math.fsum(values.tolist()) for values in found]
    expected = [math.fsum(slow[key]) for key in TO_DENSE]
    assert sums == pytest.approx(expected, rel=1e-6)
    assert sums[1:3] == expected[1:3] and expected[1] < expected[2] < 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [97, 5000, 5003])
def test_tiles_change_no_bit_of_what_is_made_of_all_tokens_at_once(
    words: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "TILE", 3 * 32 * words)
    drawn = torch.Generator().manual_seed(words)
    dense = (3 * torch.randn(260, words, generator=drawn)).to(dtype)
    pruned = (dense + torch.randn(260, words, generator=drawn)).to(dtype)
    answers = torch.randint(0, words, (260,), generator=drawn)
    before = dense.clone(), pruned.clone()
    found = evaluation.token_measures(pruned, dense, answers)
    p, q = (one.float().log_softmax(-1) for one in (dense, pruned))
    place = q.gather(1, p.argmax(-1, keepdim=True))
    earlier = torch.arange(words) < p.argmax(-1)[:, None]
    ahead = ((q > place) | (q == place) & earlier).sum(-1)
    expected = [
        q.gather(1, answers[:, None])[:, 0],
        (p.exp() * (p - q)).sum(-1),
        *(ahead < count for count in (1, 5)),
        1 - (p.exp() - q.exp()).clamp(min=0).sum(-1).double(),
    ]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other.to(one.dtype))
    assert torch.equal(before[0], dense) and torch.equal(before[1], pruned)


@pytest.mark.parametrize("words", [40, 64, 65, 127, 128, 500])
def test_the_first_of_the_greatest_is_found_where_many_are_as_great(words: int) -> None:
    drawn = torch.Generator().manual_seed(words)
    values = torch.randint(0, 3, (300, words), generator=drawn).float()
    values[:30] = -math.inf
    values[30:60, -1] = 9.0
    values[60:90, -words // 3 :] = math.nan
    first = [
        next((at for at, one in enumerate(row) if math.isnan(one)), row.index(max(row)))
        for row in values.tolist()
    ]
    assert evaluation.first_greatest(values)[:, 0].tolist() == first


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_model_agrees_and_accepts_everywhere_to_the_last_bit(family: str) -> None:
    model, ids = tiny_model(family), tiny_batches(2, 24)
    measured = evaluate(model, ids, reference=dense_reference(model, ids))
    assert [getattr(measured, key) for key in TO_DENSE] == [0.0, 1.0, 1.0, 1.0]
    alone = evaluate(model, ids)
    assert [getattr(alone, key) for key in TO_DENSE] == [None] * 4 and not alone.windows
    assert alone.window_losses == measured.window_losses


def test_a_model_that_blew_up_agrees_with_nobody() -> None:
    model, ids = tiny_model(), tiny_batches()
    reference = dense_reference(model, ids)
    find_linears(model.model)[0].weight.fill_(float("nan"))
    measured = evaluate(model, ids, reference=reference)
    assert all(math.isnan(getattr(measured, key)) for key in TO_DENSE)
