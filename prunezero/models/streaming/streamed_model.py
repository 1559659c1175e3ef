"""How does a model work that is larger than the memory: one block at a time, from its files?

The model is built from its configuration with weights on the meta device; its buffers are real.
What stands outside the blocks is read once, a block while it is needed. Nothing is hooked into the
model: a parameter changes places with a real one, and back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.anatomy.linears import find_blocks, note_calls
from prunezero.models.loading.checkpoints import Checkpoint, checked_checkpoint
from prunezero.models.loading.checks import check_finite
from prunezero.models.loading.language_model import LanguageModel, quiet
from prunezero.models.loading.load import (
    check_dtype,
    computing_dtype,
    device_of,
    explained,
    load_tokenizer,
)
from prunezero.models.loading.outline import exchange, outlines, without_weights
from prunezero.models.loading.own_changes import refuse_own_changes
from prunezero.models.loading.shards import STORED_DTYPES, Shard, Shards
from prunezero.models.loading.source import Source
from prunezero.models.observing.walk import record_calls


class StreamedModel:
    """A model whose blocks have their weights only inside `with block(index)`."""

    def __init__(
        self, source: str | Path, *, dtype: str = "auto", device: str = "auto", name: str = ""
    ) -> None:
        """Build the model, after all checks of its files; no weight is kept yet.

        Args:
            source: folder with configuration, tokenizer and safetensors, one file or several.
            dtype: of every forward pass: "float32", "bfloat16", or "auto", see `computing_dtype`.
            device: where blocks work; a torch device, or "auto": the GPU where there is one.
            name: what the user calls the model; that of the folder if empty.

        Raises:
            ModelError: the folder holds no model that can be pruned block by block.
        """
        self.folder = Path(source).expanduser()
        if not (self.folder / "config.json").is_file():
            raise ModelError(
                f"'{source}' is not a model folder: config.json is missing; a streamed model is "
                "read from a folder of safetensors files"
            )
        called = name or str(source)
        with quiet(), explained(called):
            checkpoint = checked_checkpoint(str(self.folder), called)
        self.shards = checkpoint.source.shards
        self.language_model = _on_meta_device(called, checkpoint, dtype, device)
        model = self.language_model.model
        self.blocks = find_blocks(model)
        names_of = _names_of_parameters(model)
        self._inside = [list(block.parameters()) for block in self.blocks]
        inside = {parameter for block in self._inside for parameter in block}
        self._outside = [parameter for parameter in names_of if parameter not in inside]
        if any(len(names_of[parameter]) > 1 for parameter in inside):
            raise ModelError(
                f"model '{self.language_model.name}' shares weights between its blocks, so they "
                "cannot be pruned one by one; load it whole"
            )
        self._stored = {
            parameter: self._stored_names(names) for parameter, names in names_of.items()
        }
        self._model_names = {parameter: names[0] for parameter, names in names_of.items()}
        parameters = {name for names in names_of.values() for name in names}
        self._stored_buffers = {
            name: self._stored_names([name])[0]
            for name in sorted(model.state_dict().keys() - parameters)
        }
        stored = sorted([*checkpoint.source.names.values(), *checkpoint.source.pieces])
        check_finite(((name, self.shards.read(name)) for name in stored), called)
        ids = torch.zeros((1, 2), dtype=torch.long, device=self.language_model.device)
        run = partial(record_calls, model.base_model, self.blocks, ids)
        with self.outside(), self.block(0):
            refuse_own_changes(model, called, run)
        # Which layers are called is seen without their weights.
        with self.outside(), self.outlined(), torch.no_grad():
            note_calls(model, partial(model.base_model, ids, use_cache=False))

    @property
    def _source(self) -> Source:
        source = self.language_model.source
        assert source is not None  # for the type checker: it was made of files
        return source

    def _stored_names(self, names: list[str]) -> list[str]:
        """The names that a parameter or buffer has in the files: of a stack, those of its parts."""
        source = self._source
        found = [source.names[name] for name in names if name in source.names]
        where = self.language_model.name
        if not found and source.parts.get(names[0]):
            return source.parts[names[0]]
        if not found:
            raise ModelError(
                f"the files of model '{where}' hold '{names[0]}' in another layout than the model "
                "has it, so it cannot be pruned block by block; leave out the memory limit"
            )
        for other in found[1:]:
            if not torch.equal(self.shards.read(found[0]), self.shards.read(other)):
                raise ModelError(
                    f"model '{where}' ties '{found[0]}' and '{other}' but its files hold different "
                    "numbers for them; set tie_word_embeddings to false in config.json"
                )
        return found[:1]

    @contextmanager
    def outside(self, *, with_head: bool = False) -> Iterator[None]:
        """Within it, embeddings and norms have their weights, so the inputs of blocks can be made.

        Args:
            with_head: the output head too, which makes logits of the last hidden states.

        Raises:
            ModelError: a file is damaged.
        """
        model = self.language_model.model
        body = set(model.base_model.parameters())
        for name, stored in self._stored_buffers.items():
            model.get_buffer(name).copy_(self.shards.read(stored))
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.language_model.device)
        wanted = [parameter for parameter in self._outside if with_head or parameter in body]
        with self._filled(wanted, self.shards):
            yield

    @contextmanager
    def block(self, index: int, source: Shards | Shard | None = None) -> Iterator[nn.Module]:
        """Within it, the block has its weights, those of another source if given.

        What is changed in them is lost afterwards; `stored_block` gives it to be kept.

        Raises:
            ModelError: a file is damaged.
        """
        with self._filled(self._inside[index], source or self.shards):
            yield self.blocks[index]

    @contextmanager
    def _filled(self, parameters: list[nn.Parameter], source: Shards | Shard) -> Iterator[None]:
        placeholders: list[nn.Parameter] = []
        try:
            for parameter in parameters:
                placeholders.append(self._fill(parameter, source))
            yield
        finally:
            for parameter, placeholder in zip(parameters, placeholders, strict=False):
                exchange(parameter, placeholder)

    def _fill(self, parameter: nn.Parameter, source: Shards | Shard) -> nn.Parameter:
        """Give a parameter its numbers; what comes back is its place on the meta device."""
        device = self.language_model.device
        stored, pieces = self._stored[parameter], self._source.pieces
        if stored[0] in pieces:
            real = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            for name in stored:
                pieces[name].of(real).copy_(source.read(name))
        else:
            real = source.read(stored[0]).to(device, parameter.dtype)
        twin = nn.Parameter(real, requires_grad=False)
        # The object stays the same one, so weights that are tied stay tied.
        exchange(parameter, twin)
        return twin

    def stored_block(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """The weights of a block that is in memory as its files will hold them, one by one.

        Each with its name in the files, on the CPU; see `Source.saved`.

        Raises:
            ModelError: a number is too large for the stored dtype.
        """
        source = self._source
        for parameter in self._inside[index]:
            for stored in self._stored[parameter]:
                if stored in source.pieces:
                    yield stored, source.saved_piece(stored, parameter[source.pieces[stored].index])
                else:
                    yield stored, source.saved(self._model_names[parameter], parameter)

    def names_outside(self) -> list[str]:
        """Names of all tensors in the files that no block has, also of those that nobody uses."""
        inside = {name for block in self._inside for one in block for name in self._stored[one]}
        return [name for name in self.shards.tensors if name not in inside]

    @contextmanager
    def outlined(self) -> Iterator[None]:
        """Within it, weights of the blocks have shapes and places, but all their numbers are one.

        For what looks at shapes alone and refuses weights that are not loaded.
        """
        weights = [parameter for block in self._inside for parameter in block]
        shapes = outlines(weights, self.language_model.device)
        for weight, outline in zip(weights, shapes, strict=True):
            exchange(weight, outline)
        try:
            yield
        finally:
            for weight, outline in zip(weights, shapes, strict=True):
                exchange(weight, outline)

    def weight_bytes(self) -> tuple[int, int]:
        """Memory for what is outside the blocks, and for the largest block.

        Weights stored in another dtype count twice: they are in memory as they work and as stored.
        """
        outside = sum(map(self._bytes, self._outside))
        return outside, max(sum(map(self._bytes, block)) for block in self._inside)

    def _bytes(self, parameter: nn.Parameter) -> int:
        stored = STORED_DTYPES[self.shards.tensors[self._stored[parameter][0]].dtype]
        copied = 0 if stored == parameter.dtype else stored.itemsize
        return parameter.numel() * (parameter.dtype.itemsize + copied)


def _on_meta_device(name: str, checkpoint: Checkpoint, dtype: str, device: str) -> LanguageModel:
    check_dtype(dtype)
    place = device_of(device)
    source = checkpoint.source
    with quiet(), explained(name):
        chosen = computing_dtype(dtype, place, source.shards)
        model = without_weights(checkpoint.configuration, chosen)
        tokenizer = load_tokenizer(str(source.folder))
    return LanguageModel(model, tokenizer, name, source.shards.fingerprint(), chosen, place, source)


def _names_of_parameters(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every name of every parameter; tied ones have several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names
