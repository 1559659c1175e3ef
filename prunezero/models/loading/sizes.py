"""Does a configuration ask for more than its files hold? Told before anything is built of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from prunezero.errors import ModelError
from prunezero.models.observing.hooks import removing

# What every configuration has, as transformers calls it; a family may have its own words for them.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "head_dim",
    "max_position_embeddings",
)
_AT_LEAST_ONE = _SIZES[:4]
# Keys that count layers: lists of that length are made of them.
_COUNTS = re.compile(r"(^|_)(layers?|blocks?|depth|attention_types)$")
# Some count what no tensor shows, such as the layers from which on windows would slide.
_USUAL_COUNT = 1000
# So many parameters and numbers may be asked for per stored one: fused ones are cut, tied ones are
# there twice. And so many more, for what is computed and not stored.
_PER_STORED, _MORE_TENSORS, _MORE_NUMBERS = 4, 64, 2**20


def check_sizes(raw: Mapping[str, Any], words: Mapping[str, str], tensors: int, name: str) -> None:
    """Refuse sizes and counts that are none, or more layers than the files have tensors.

    Args:
        raw: the configuration as its file holds it; parts inside are looked at as well.
        words: the words of this family by those of all, as `attribute_map` has them.
        tensors: in the files.
        name: of the model, for messages.

    Raises:
        ModelError: one is; the message names the key.
    """
    for size in _SIZES:
        for key in {size, words.get(size, size)} & raw.keys():
            value = raw[key]
            least = int(size in _AT_LEAST_ONE)
            if not isinstance(value, list | None) and (type(value) is not int or value < least):
                raise ModelError(
                    f"model '{name}': {key} in config.json must be a whole number of at least "
                    f"{least} but is {value!r}; get the file again"
                )
    for key, value in raw.items():
        if isinstance(value, Mapping):
            check_sizes(value, words, tensors, name)
        elif _COUNTS.search(key):
            own = key in ("num_hidden_layers", words.get("num_hidden_layers"))
            most = tensors if own else max(tensors, _USUAL_COUNT)
            for count in _whole_numbers(value):
                if count > most:
                    raise ModelError(
                        f"model '{name}': {key} in config.json is {count}, but its files hold only "
                        f"{tensors} tensors; get the files again"
                    )


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for part in value:
            yield from _whole_numbers(part)
    elif isinstance(value, int):
        yield value


@contextmanager
def building_at_most(tensors: int, numbers: int, name: str) -> Iterator[None]:
    """Within it, no network gets many more parameters than so many tensors can fill.

    Raises:
        ModelError: one asks for more; it is stopped while it is built, on whatever device.
    """
    left = [_PER_STORED * tensors + _MORE_TENSORS, _PER_STORED * numbers + _MORE_NUMBERS]

    def count(module: nn.Module, key: str, parameter: nn.Parameter | None) -> None:
        if parameter is None:
            return
        left[0] -= 1
        left[1] -= parameter.numel()
        if min(left) < 0:
            raise ModelError(
                f"model '{name}': its configuration asks for more weights than its files hold "
                f"({tensors} tensors of {numbers} numbers together; the last one asked for was of "
                f"shape {list(parameter.shape)}); get the files again"
            )

    handle = register_module_parameter_registration_hook(count)
    with removing([handle]):
        yield
