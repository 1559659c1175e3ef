"""Low-rank factors in training: each layer computes with W + M * (alpha / rank * BA).

M is 0 where a weight is zero and 1 elsewhere, in the forward pass too, so training sees what is
merged in the end, and every zero stays. Where whole rows and columns are zero, or nothing is, the
mask is one of the factors, so that neither BA nor its gradient ever exists as a whole matrix; of
other masks they do, for a moment, one layer at a time. The layers, their initial factors and the
merge are those of `peft`; the mask is ours.

Source: Hu et al. 2022, LoRA (ICLR), arXiv:2106.09685.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from prunezero.errors import ModelError
from prunezero.models.anatomy.linears import Linear
from prunezero.pruning.recipes.training_options import LowRank
from prunezero.pruning.recovery.moves import coming_move

# What `peft` calls our factors.
_NAME = "recovery"


@functools.cache
def _masked_linear() -> type[Any]:
    """The class of `peft` for linear maps, with a mask; `peft` takes seconds to import."""
    from peft.tuners.lora import Linear as LoraLinear

    class MaskedLinear(LoraLinear):  # type: ignore[misc]
        """A linear map with low-rank factors that never change weights which are zero."""

        is_removed: Tensor
        """bool of the shape of the weight in its module"""
        sides: tuple[Tensor, Tensor] | None
        """the rows [out, 1] and columns [in] of the weight that stay, where what is removed are
        whole rows and columns; else None"""

        def hold(self, is_removed: Tensor) -> None:
            """Have weights removed from now on, bool of the shape of the weight in its module."""
            self.is_removed = is_removed
            self.sides = _sides(is_removed.T if self.fan_in_fan_out else is_removed)

        def get_delta_weight(self, adapter: str) -> Tensor:
            """What is merged: the product of the factors under the mask."""
            delta: Tensor = super().get_delta_weight(adapter)
            return delta.masked_fill(self.is_removed, 0.0)

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            """What the layer computes once it is merged, and with dropout a noisier version."""
            # Without gradients it computes with the weights as they are merged, rounding included.
            if self.sides is not None and torch.is_grad_enabled():
                return self._by_factors(x, *self.sides)
            base, dropout = self.get_base_layer(), self.lora_dropout[_NAME]
            delta = self.get_delta_weight(_NAME)
            if isinstance(dropout, nn.Identity) or not dropout.training:
                merged = (base.weight + delta).to(base.weight.dtype)
                return functional_call(base, {"weight": merged}, (x,))
            change = {"weight": delta.to(base.weight.dtype)}
            if base.bias is not None:
                change["bias"] = torch.zeros_like(base.bias)
            return base(x) + functional_call(base, change, (dropout(x),))

        def _by_factors(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
            """The same by one factor after the other, the size of whose gradients is their own."""
            first, second = (one[_NAME].weight for one in (self.lora_A, self.lora_B))
            inputs = self.lora_dropout[_NAME](x).to(first.dtype)
            change = linear(linear(inputs, first * columns), second * rows)
            found: Tensor = self.get_base_layer()(x)
            return found + (change * self.scaling[_NAME]).to(found.dtype)

    return MaskedLinear


def _sides(is_removed: Tensor) -> tuple[Tensor, Tensor] | None:
    """The rows [out, 1] and columns [in] that stay, if all else is removed; else None.

    Args:
        is_removed: bool [out, in].
    """
    rows, columns = is_removed.all(1, keepdim=True), is_removed.all(0)
    return (~rows, ~columns) if torch.equal(rows | columns, is_removed) else None


@dataclass(frozen=True)
class Factors:
    """The low-rank factors of some layers in training."""

    modules: dict[str, Any]
    """by the names of the layers, in their order"""
    touched: set[str] = field(default_factory=set, init=False)
    """layers whose own weights changed, but for those that became zero"""

    @property
    def masters(self) -> list[Tensor]:
        """What the optimizer changes; backward passes fill their gradients."""
        factors = ((module.lora_A, module.lora_B) for module in self.modules.values())
        return [factor[_NAME].weight for pair in factors for factor in pair]

    def write(self) -> None:
        """Let the model compute with the masters as they are now: it does so anyway."""

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Within it the model computes what it will once training is done, without dropout."""
        dropouts = [module.lora_dropout[_NAME] for module in self.modules.values()]
        for dropout in dropouts:
            dropout.eval()
        try:
            yield
        finally:
            for dropout in dropouts:
                dropout.train()

    def merge(self) -> None:
        """Leave in the model's weights what was trained."""
        for module in self.modules.values():
            module.merge(adapter_names=[_NAME])

    @torch.no_grad()
    def seen(self, layer: str) -> dict[str, Tensor]:
        """What features read of the factors of a layer as they are now, see `feature_row.py`."""
        module = self.modules[layer]
        first, second = (one[_NAME].weight for one in (module.lora_A, module.lora_B))
        change = module.get_delta_weight(_NAME)
        return {
            "factor_a": first.detach(),
            "factor_b": second.detach(),
            "gradient_a": first.grad,
            "gradient_b": second.grad,
            "change": change.T if module.fan_in_fan_out else change,
        }

    @torch.no_grad()
    def moving(
        self, layer: str, optimizer: torch.optim.Optimizer, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The changed weight of a layer and what the coming step takes from it, [out, in].

        The second is alpha / rank * (dB A + B dA), of the first order, at a learning rate of 1.

        Args:
            scale: of the gradients, before the optimizer sees them.
        """
        module = self.modules[layer]
        first, second = (one[_NAME].weight for one in (module.lora_A, module.lora_B))
        moves = [coming_move(optimizer, one, scale) for one in (first, second)]
        direction = module.scaling[_NAME] * (moves[1] @ first + second @ moves[0])
        weight, change = self.changing(layer)
        gone = module.is_removed.T if module.fan_in_fan_out else module.is_removed
        return weight + change, direction.masked_fill(gone, 0.0)

    @torch.no_grad()
    def changing(self, layer: str) -> tuple[Tensor, Tensor]:
        """The weight of a layer and the change that its factors make, [out, in] each."""
        weight, change = self._weight(layer), self.seen(layer)["change"]
        return weight.to(change.dtype), change

    def frozen(self) -> dict[str, Tensor]:
        """Weights of layers that changed and are no factors, by the layers' names."""
        return {layer: self._weight(layer).contiguous() for layer in sorted(self.touched)}

    def layer_weights(self) -> dict[str, Tensor]:
        """The layers' own weights, which are no masters, by the layers' names."""
        return {layer: self._weight(layer).contiguous() for layer in self.modules}

    def load_frozen(self, tensors: Mapping[str, Tensor]) -> None:
        """Be as it was when `frozen` gave these."""
        for layer, tensor in tensors.items():
            self._weight(layer).copy_(tensor)
            self.touched.add(layer)

    @torch.no_grad()
    def shrink(self, masks: Mapping[str, Tensor], factor: float) -> None:
        """Multiply whole rows or columns of changed weights by a factor.

        Args:
            masks: bool [out, in] by the name of a layer, False = is multiplied.
        """
        for layer, mask in masks.items():
            self._weight(layer).mul_(torch.where(mask, 1.0, factor))
            self._scale_change(layer, mask, factor)

    @torch.no_grad()
    def take_up(self, masks: Mapping[str, Tensor], factor: float) -> None:
        """Multiply whole rows or columns of weights, and add their change, which is none then.

        Args:
            masks: bool [out, in] by the name of a layer, False = is changed.
        """
        for layer, mask in masks.items():
            weight, change = self.changing(layer)
            self._weight(layer).copy_(torch.where(mask, weight, factor * weight + change))
            self._scale_change(layer, mask, 0.0)

    @torch.no_grad()
    def transfer(self) -> None:
        """Let all weights take up their change; the factors then make none, by B = 0."""
        for layer, module in self.modules.items():
            weight, change = self.changing(layer)
            self._weight(layer).copy_(weight + change)
            self.touched.add(layer)
            module.lora_B[_NAME].weight.zero_()

    def _scale_change(self, layer: str, mask: Tensor, factor: float) -> None:
        """Multiply the change of whole rows or columns, by rows of B or columns of A."""
        module = self.modules[layer]
        self.touched.add(layer)
        rows, columns = (~mask).all(1), (~mask).all(0)
        module.lora_B[_NAME].weight.mul_(torch.where(rows, factor, 1.0)[:, None])
        module.lora_A[_NAME].weight.mul_(torch.where(columns, factor, 1.0))

    def _weight(self, layer: str) -> Tensor:
        """The weight of a layer itself, [out, in], which shares storage."""
        module = self.modules[layer]
        weight: Tensor = module.get_base_layer().weight.detach()
        return weight.T if module.fan_in_fan_out else weight

    @torch.no_grad()
    def remove(self, masks: Mapping[str, Tensor]) -> None:
        """Take weights out of the model and of the training: zeros, which stay so.

        Args:
            masks: bool [out, in] by the name of a layer, True = stays.
        """
        for layer, mask in masks.items():
            module = self.modules[layer]
            gone = ~(mask.T if module.fan_in_fan_out else mask)
            module.hold(module.is_removed | gone.to(module.is_removed.device))
            module.get_base_layer().weight.masked_fill_(module.is_removed, 0.0)


@contextmanager
def train_factors(
    model: nn.Module, layers: Sequence[Linear], options: LowRank
) -> Iterator[Factors]:
    """Within it, layers have factors, which start as no change and get gradients.

    Raises:
        ModelError: modules share the weight of a layer, or the layout is not one of `peft`.
    """
    _refuse_shared(model, layers)
    with ExitStack() as undo:
        for layer in layers:
            undo.callback(_put, model, layer.name, layer.module)
        if not hasattr(model, "peft_config"):
            undo.callback(vars(model).pop, "peft_config", None)
        _inject(model, layers, options)
        modules: dict[str, Any] = {one.name: model.get_submodule(one.name) for one in layers}
        for layer, masked in zip(layers, modules.values(), strict=True):
            # transformers' Conv1D holds its weight turned.
            masked.fan_in_fan_out = not isinstance(layer.module, nn.Linear)
            weight: Any = layer.module.weight
            masked.hold(weight.detach() == 0)
        factors = Factors(modules)
        for module in modules.values():
            # Small steps would be lost in the rounding of 16 bits.
            module.lora_A.float()
            module.lora_B.float()
        for master in factors.masters:
            master.requires_grad_(True)
        yield factors


def _inject(model: nn.Module, layers: Sequence[Linear], options: LowRank) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    configuration = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=[layer.name for layer in layers],
    )
    kinds = {type(layer.module) for layer in layers}
    configuration._register_custom_module(dict.fromkeys(kinds, _masked_linear()))
    try:
        inject_adapter_in_model(configuration, model, adapter_name=_NAME)
    except ValueError as error:
        raise ModelError(
            f"low-rank factors do not fit {type(model).__name__} ({error}); train its weights "
            "instead (recover: tune)"
        ) from error


def _refuse_shared(model: nn.Module, layers: Sequence[Linear]) -> None:
    counts = Counter(id(one) for _, one in model.named_parameters(remove_duplicate=False))
    for layer in layers:
        if counts[id(layer.module.weight)] > 1:
            raise ModelError(
                f"several modules share the weight of '{layer.name}', and low-rank factors would "
                "change it in one of them; leave it out by targets, or train its weights instead"
            )


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, child = name.rpartition(".")
    model.get_submodule(path)._modules[child] = module
