"""Random tiny models of six families, and tokenizers for them, built in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prunezero.models.loading.load import LanguageModel, wrap_model

HIDDEN = 32
BLOCKS = 2
VOCABULARY = 97
LONGEST = 64


def _shared() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "max_position_embeddings": LONGEST,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }


def _llama(**changes: Any) -> Any:
    from transformers import LlamaConfig

    known = {**_shared(), "intermediate_size": 64, "num_key_value_heads": 2}
    return LlamaConfig(**{**known, "tie_word_embeddings": True, **changes})


def _mistral(**changes: Any) -> Any:
    from transformers import MistralConfig

    known = {**_shared(), "intermediate_size": 64, "num_key_value_heads": 2}
    return MistralConfig(**{**known, "sliding_window": 8, **changes})


def _qwen3(**changes: Any) -> Any:
    from transformers import Qwen3Config

    known = {**_shared(), "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
    return Qwen3Config(**{**known, **changes})


def _gpt2(**changes: Any) -> Any:
    from transformers import GPT2Config

    size = {"n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": 4, "n_positions": LONGEST}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
    return GPT2Config(**{**size, **tokens, **changes})


def _opt(**changes: Any) -> Any:
    from transformers import OPTConfig

    known = {**_shared(), "ffn_dim": 64, "word_embed_proj_dim": HIDDEN, "pad_token_id": 2}
    return OPTConfig(**{**known, **changes})


def _gemma3(**changes: Any) -> Any:
    from transformers import Gemma3TextConfig

    known = {**_shared(), "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
    kinds = ["sliding_attention", "full_attention"]
    known |= {"query_pre_attn_scalar": 8, "sliding_window": 8, "layer_types": kinds}
    return Gemma3TextConfig(**{**known, **changes})


def _phi3(**changes: Any) -> Any:
    from transformers import Phi3Config

    known = {**_shared(), "intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 2}
    return Phi3Config(**{**known, **changes})


def _gpt_neox(**changes: Any) -> Any:
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(**{**_shared(), "intermediate_size": 64, **changes})


CONFIGURATIONS: dict[str, Callable[..., Any]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen3": _qwen3,
    "gpt2": _gpt2,
    "opt": _opt,
    "gemma3": _gemma3,
}
FAMILIES = tuple(CONFIGURATIONS)
# Fused gates and queries, and attention beside the MLP: for tests of how matrices hang together.
CONFIGURATIONS |= {"phi3": _phi3, "gpt_neox": _gpt_neox}
LAYOUTS = tuple(CONFIGURATIONS)


def tiny_network(family: str, *, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random network of the family in float32; `changes` go to its configuration."""
    from transformers import AutoModelForCausalLM

    configuration = CONFIGURATIONS[family](**changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(configuration, dtype=torch.float32)
    return network.eval()


def tiny_model(family: str = "llama", *, seed: int = 0, **changes: Any) -> LanguageModel:
    """A random tiny `LanguageModel` of the family, float32 on the CPU."""
    return wrap_model(tiny_network(family, seed=seed, **changes), tiny_tokenizer(), name=family)


def tiny_tokenizer(around: str = "") -> Any:
    """One token per printable ASCII character: ids 0 and 1 are <s> and </s>, 2 is unknown.

    Args:
        around: what it puts around a text, such as "<s> $A"; nothing if left out.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *(chr(code) for code in range(32, 126))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if around:
        ends = [(word, vocabulary[word]) for word in around.split() if word in vocabulary]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=ends)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_tiny_model(family: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny network and its tokenizer so that `load_model(str(folder))` works offline."""
    tiny_network(family, seed=seed, **changes).save_pretrained(folder)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_batches(count: int = 4, length: int = 16, *, seed: int = 0) -> torch.Tensor:
    """Random token ids [count, length] that every tiny model knows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator)
