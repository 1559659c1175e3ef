"""The parity tool sees every difference, and says how near to the threshold it is."""

from __future__ import annotations

import pytest
import torch

from prunezero.formula.criterion import Criterion
from prunezero.scoring import fused
from prunezero.scoring import parity as module
from prunezero.scoring.parity import Parity, parity
from tests.scoring.test_fused import DEVICE

pytest.importorskip("triton")

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")

ODD = "abs(W)**0.3 * exp(-X) + tanh(G)"


def layer() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator).to(DEVICE)
    gradient = torch.rand(16, 64, generator=generator).to(DEVICE)
    return weight, {"G": gradient, "X": torch.rand(1, 64, generator=generator).to(DEVICE)}


@pytest.mark.parametrize("pattern", ["free", "2:4"])
@pytest.mark.parametrize("text", ["abs(W)*X", "W**2*G + X", "abs(W)/G"])
def test_exact_operators_leave_no_difference(text: str, pattern: str) -> None:
    weight, features = layer()
    found = parity(Criterion.parse(text), weight, features, 0.5, pattern=pattern)
    assert found == Parity(1024, 0, 0, 0)
    assert str(found) == "equal masks of 1024 weights (scores within 0 ulp)"


def test_approximate_operators_differ_in_last_places_alone() -> None:
    weight, features = layer()
    found = parity(Criterion.parse(ODD), weight, features, 0.5)
    assert 0 < found.scores <= 32
    assert found.threshold <= found.scores


def test_a_kernel_that_is_wrong_is_seen_with_its_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, features = layer()
    real = fused.fused_mask

    def wrong(*arguments: object, **choices: object) -> torch.Tensor:
        kept = real(*arguments, **choices).clone()  # type: ignore[arg-type]
        largest = weight[3].abs().argmax()
        kept[3, largest] = False
        return kept

    monkeypatch.setattr(module, "fused_mask", wrong)
    found = parity(Criterion.parse("abs(W)"), weight, features, 0.5)
    assert found.differing == 1 and found.threshold > 1_000_000
    assert "1 of 1024 weights differ, within" in str(found)


def test_distances_count_the_numbers_between() -> None:
    one = torch.tensor([1.0, -1.0, 0.0, -0.0])
    after = torch.nextafter(one, torch.full_like(one, 2.0))
    steps = module._places(after) - module._places(one)
    assert steps.tolist() == [1, 1, 1, 1]
