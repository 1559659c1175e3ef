"""Features of keys and values equal their definitions, written as plain loops in numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prunezero.errors import StatisticsError
from prunezero.formula.criterion import Criterion
from prunezero.formula.feature_row import OF_ATTENTION, SIMULATED_SIGNALS
from prunezero.formula.features import FEATURES, features_of_domain
from prunezero.models.attending.observing import Attended, Looks, Measured
from prunezero.models.attending.policy import Policy
from prunezero.models.attending.values import VALUES, column_features

COLUMNS = features_of_domain("kv_column")
HEADS, GROUP, KEYS, WIDTH, HIDDEN = 2, 3, 150, 8, 12
LOOKS = Looks(window=6, pool=5, lag=16)
SCALING = 0.4

Array = np.ndarray[Any, Any]


def attended(
    keys: int = KEYS, *, seed: int = 0, heads: int = HEADS, group: int = GROUP
) -> Attended:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mixing = drawn(heads * group, WIDTH, WIDTH)
    measured = Measured(
        *(drawn(heads * group, WIDTH), mixing @ mixing.mT / 8),
        *(drawn(heads, keys).abs(), drawn(heads, keys).abs(), drawn(heads).abs()),
    )
    return Attended(
        layer=1,
        queries=drawn(heads * group, keys, WIDTH),
        keys=drawn(heads, keys, WIDTH) + 0.5,
        values=drawn(heads, keys, WIDTH),
        positions=torch.arange(keys).expand(heads, keys),
        scaling=SCALING,
        writer=drawn(HIDDEN, heads * group * WIDTH),
        measured=measured,
    )


def maps(one: Attended) -> Array:
    """Attention [key-value heads, queries, keys], the mean over a group."""
    q, k = one.queries.double().numpy(), one.keys.double().numpy()
    found = np.zeros((HEADS, KEYS, KEYS))
    for head in range(HEADS * GROUP):
        for i in range(KEYS):
            logits = k[head // GROUP, : i + 1] @ q[head, i] * SCALING
            weights = np.exp(logits - logits.max())
            found[head // GROUP, i, : i + 1] += weights / weights.sum() / GROUP
    return found


def softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def lagged(states: Array, lag: int) -> Array:
    found = np.ones(states.shape[:2])
    chunks = KEYS // lag
    for chunk in range(chunks - 1):
        here = slice(chunk * lag, (chunk + 1) * lag)
        after = states[:, (chunk + 1) * lag : (chunk + 2) * lag]
        low, high = after.min(1, keepdims=True), after.max(1, keepdims=True)
        scaled = (states[:, here] - low) / (high - low)
        found[:, here] = softmax(scaled.std(-1, ddof=1))
    return found


def pooled(values: Array, before: int, kernel: int) -> Array:
    found = values.copy()
    for key in range(before):
        near = range(max(0, key - kernel // 2), min(before, key + kernel // 2 + 1))
        found[:, key] = sum(values[:, one] for one in near) / kernel
    return found


def expected(name: str, one: Attended) -> Array:
    k, v = one.keys.double().numpy(), one.values.double().numpy()
    places = np.arange(KEYS)
    if name in ("AGE", "POS"):
        return np.broadcast_to(KEYS - 1 - places if name == "AGE" else places, (HEADS, KEYS))
    if name == "KDEV":
        directions = k / np.linalg.norm(k, axis=-1, keepdims=True)
        mean = directions.mean(1)
        mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
        return -np.einsum("hkd,hd->hk", directions, mean)
    if name == "VON":
        assert one.writer is not None
        parts = one.writer.double().numpy().reshape(HIDDEN, HEADS * GROUP, WIDTH)
        written = [np.abs(v[head // GROUP] @ parts[:, head].T).sum(-1) for head in range(6)]
        return np.stack([np.mean(written[:3], 0), np.mean(written[3:], 0)])
    if name == "EXPECTED":
        mean, covariance = one.measured.query_mean, one.measured.query_covariance
        assert mean is not None and covariance is not None
        m, c = mean.double().numpy() * SCALING, covariance.double().numpy() * SCALING**2
        heads = [
            softmax(
                k[h // GROUP] @ m[h] + np.einsum("kd,de,ke->k", *(k[h // 3], c[h], k[h // 3])) / 2
            )
            for h in range(HEADS * GROUP)
        ]
        return np.stack([np.mean(heads[:3], 0), np.mean(heads[3:], 0)])
    if name == "ATT_NEXT":
        assert one.measured.next_attention is not None
        return one.measured.next_attention.numpy()
    if name == "ATT_READ":
        assert one.measured.reread_attention is not None
        return one.measured.reread_attention.numpy()
    if name == "STREAM":
        error = one.measured.streaming_error
        assert error is not None
        return np.repeat(error.numpy()[:, None], KEYS, 1)
    a = maps(one) if name.startswith("ATT") else np.zeros(0)
    found: dict[str, Callable[[], Any]] = {
        "KN": lambda: np.linalg.norm(k, axis=-1),
        "VN": lambda: np.linalg.norm(v, axis=-1),
        "ATT_W": lambda: pooled(a[:, -6:].mean(1), KEYS - 6, 5),
        "ATT_LAST": lambda: a[:, -1],
        "ATT_SUM": lambda: a.sum(1),
        "ATT_MAX": lambda: a.max(1),
        "ATT_MEAN": lambda: a.sum(1) / (KEYS - places),
        "LAGK": lambda: lagged(k, 16),
        "LAGV": lambda: lagged(v, 16),
    }
    return np.asarray(found[name]())


@pytest.mark.parametrize("name", sorted({*COLUMNS} - {"RNDK"}))
def test_a_feature_of_keys_equals_its_definition(name: str) -> None:
    one = attended()
    value = column_features([name], one, LOOKS)[name]
    assert value.dtype == torch.float32 and value.shape == (HEADS, 1, KEYS)
    np.testing.assert_allclose(value[:, 0].numpy(), expected(name, one), rtol=2e-5, atol=1e-7)


def test_what_rows_read_has_a_value_and_nothing_else() -> None:
    read = {name for column in COLUMNS for name in FEATURES[column].inputs}
    assert read == set(VALUES) and read <= set(OF_ATTENTION)


def test_capped_logits_give_other_attention() -> None:
    one = replace(attended(), softcap=2.0)
    q, k = one.queries[:3, -1].double().numpy(), one.keys[0].double().numpy()
    wanted = np.mean([softmax(2 * np.tanh(k @ row * SCALING / 2)) for row in q], 0)
    value = column_features(["ATT_LAST"], one, LOOKS)["ATT_LAST"]
    np.testing.assert_allclose(value[0, 0].numpy(), wanted, rtol=2e-5)


def test_noise_stays_with_its_key_and_differs_by_layer_head_and_seed() -> None:
    one = attended()
    value = column_features(["RNDK"], one, LOOKS)["RNDK"]
    places = torch.tensor([[3, 50, 149], [0, 7, 149]])
    fewer = replace(one, keys=one.keys[:, :3], positions=places)
    assert torch.equal(
        column_features(["RNDK"], fewer, LOOKS)["RNDK"][:, 0], value[:, 0].gather(1, places)
    )
    others = [replace(one, layer=2), one]
    looks = [LOOKS, replace(LOOKS, seed=1)]
    for other, look in zip(others, looks, strict=True):
        assert not torch.equal(column_features(["RNDK"], other, look)["RNDK"], value)
    assert not torch.equal(value[0], value[1])


def test_what_was_not_measured_is_refused_by_name() -> None:
    bare = replace(attended(), measured=Measured(), writer=None)
    for name in ("EXPECTED", "ATT_NEXT", "ATT_READ", "VON", "STREAM"):
        with pytest.raises(StatisticsError, match=f"feature {name} looks at .* layer 1"):
            column_features([name], bare, LOOKS)


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, Tensor):
                self.largest = max(self.largest, one.numel())
        return found


@pytest.mark.parametrize("name", COLUMNS)
def test_a_cheap_feature_makes_no_tensor_of_all_pairs(name: str) -> None:
    keys = 8192
    one = attended(keys, heads=1, group=1)
    with _Largest() as guard:  # type: ignore[no-untyped-call]
        Policy(Criterion.parse(name), 0.5, looks=LOOKS).chosen(one, keys // 2)
    # Pairs of even a hundredth of the queries would be more.
    assert guard.largest < keys * keys // 100 or FEATURES[name].cost in SIMULATED_SIGNALS


def test_the_guard_sees_a_full_map() -> None:
    one = attended(1024, heads=1, group=1)
    with _Largest() as guard:  # type: ignore[no-untyped-call]
        one.attention(0, 1024)
    assert guard.largest == 1024 * 1024


def test_norms_of_bfloat16_keep_what_norms_of_float32_keep() -> None:
    one = attended(4096, heads=1, group=1)
    rounded = one.keys.bfloat16()
    kept = Policy(Criterion.parse("-KN"), 0.25).chosen(replace(one, keys=rounded.float()), 1024)
    exact = torch.linalg.vector_norm(rounded.double(), dim=-1)
    inside = exact[0, 4:-32]
    wanted = set((inside.argsort()[: 1024 - 36] + 4).tolist()) | {*range(4), *range(4064, 4096)}
    assert set(kept[0].nonzero()[:, 0].tolist()) == wanted
    # In bfloat16 itself most norms are equal to others.
    coarse = torch.linalg.vector_norm(rounded, dim=-1)
    assert len(coarse.unique()) < 1024
