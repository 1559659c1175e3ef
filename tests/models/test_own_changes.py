"""A model that writes to its own weights is refused before anything is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prunezero.errors import ModelError
from prunezero.models.loading.language_model import wrap_model
from prunezero.models.loading.load import load_model
from prunezero.models.streaming.streamed_model import StreamedModel
from tests.tiny_models import tiny_network, tiny_tokenizer


def save_rwkv(folder: Path, rescale_every: int) -> Path:
    from transformers import RwkvConfig, RwkvForCausalLM

    configuration = RwkvConfig(
        vocab_size=97,
        hidden_size=16,
        attention_hidden_size=16,
        num_hidden_layers=3,
        context_length=64,
        rescale_every=rescale_every,
    )
    RwkvForCausalLM(configuration).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", [load_model, StreamedModel])
def test_a_model_that_rescales_itself_is_refused_by_name(way: Any, tmp_path: Path) -> None:
    folder = save_rwkv(tmp_path / "rwkv", 2)
    with pytest.raises(ModelError, match="RwkvForCausalLM.* changes its own weights") as caught:
        way(str(folder), device="cpu")
    assert "attention.output.weight" in str(caught.value)


@pytest.mark.parametrize("way", [load_model, StreamedModel])
def test_it_is_taken_once_it_no_longer_does(way: Any, tmp_path: Path) -> None:
    way(str(save_rwkv(tmp_path / "rwkv", 0)), device="cpu")


def test_a_layer_that_writes_to_a_weight_is_found_whatever_its_class() -> None:
    network: Any = tiny_network("gpt2")
    weight = network.transformer.h[1].mlp.c_fc.weight

    def halve(*arguments: object) -> None:
        weight.mul_(0.5)

    network.transformer.h[0].register_forward_hook(halve)
    with pytest.raises(ModelError, match=r"'transformer.h.1.mlp.c_fc.weight' among 1"):
        wrap_model(network, tiny_tokenizer(), name="halving")


def test_a_model_that_only_reads_its_weights_has_the_same_ones_afterwards() -> None:
    network = tiny_network("llama")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    wrap_model(network, tiny_tokenizer(), name="llama")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
