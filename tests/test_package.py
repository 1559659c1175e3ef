"""The wheel holds one package, with the YAML folders inside it; the public names work."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import prunezero

ROOT = Path(__file__).resolve().parent.parent


def test_the_wheel_holds_prunezero_alone_with_recipes_and_spaces_inside(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"prunezero"}
    inside = {"baselines/wanda.yaml", "search_spaces/formulas.yaml", "py.typed"}
    assert {f"prunezero/{name}" for name in inside} <= set(names)


@pytest.mark.parametrize("name", prunezero.__all__)
def test_every_public_name_is_what_it_says(name: str) -> None:
    assert callable(getattr(prunezero, name))
    # Loading a name must not hide another one behind a module of the same name.
    assert callable(getattr(prunezero, name))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        _ = prunezero.serach
