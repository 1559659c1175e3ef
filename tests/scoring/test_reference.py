"""The reference itself is checked by hand, on two by two weights."""

from __future__ import annotations

import numpy as np

from tests.scoring import reference


def test_the_reference_formulas_give_numbers_checked_by_hand() -> None:
    values = {
        "W": np.array([[1.0, -2.0], [3.0, 0.0]], dtype=np.float32),
        "X": np.array([[4.0, 1.0]], dtype=np.float32),
        "G": np.array([[0.0, 1.0], [2.0, 4.0]], dtype=np.float32),
        "G1": np.array([[0.0, 0.01], [0.02, 0.03]], dtype=np.float32),
    }
    expected: dict[str, list[list[float]]] = {
        "magnitude": [[1, 2], [3, 0]],
        "ri": [[1 / 4 + 1 / 3, 1 + 2 / 3], [3 / 4 + 1, 0]],
        "ria": [[2 * (1 / 4 + 1 / 3), 1 + 2 / 3], [3.5, 0]],
        "wanda": [[4, 2], [12, 0]],
        "gblm": [[4, 4], [18, 0]],
        "pruner_zero": [[0, 1], [4.5, 0]],
        "obd": [[16, 4], [144, 0]],
        "fisher": [[0, 4], [36, 0]],
    }
    for name, wanted in expected.items():
        scores = reference.FORMULAS[name](values)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, wanted, rtol=1e-6, err_msg=name)
