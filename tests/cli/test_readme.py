"""What the README tells a newcomer to type works, in the order in which it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prunezero.cli import app
from prunezero.pruning.recipes.recipe import Recipe
from tests.cli.conftest import SMALL, Run

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python|yaml)\n(.*?)```", README, flags=re.DOTALL)
# Prompts are longer than other windows, and no test text is read.
KEYS = "--sequence-length 64 --calibration-tokens 128 --evaluation-tokens 128"
# Opens a web page, and waits.
SERVERS = ("prunezero ui",)


def commands() -> list[str]:
    text = "\n".join(body for language, body in BLOCKS if language == "bash")
    lines = text.replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.startswith("prunezero ")]


def test_the_readme_shows_every_command() -> None:
    shown = {command.split()[1] for command in commands()}
    assert shown == (
        {
            "search",
            "show",
            "verify",
            "transfer",
            "compare",
            "prune",
            "plan",
            "export",
            "list",
            "ui",
            "doctor",
        }
    )
    assert "make search" in README and "make test" in README


def test_the_commands_of_the_readme_run_one_after_another(
    tiny_files: tuple[Path, Path], run: Run
) -> None:
    model, text = tiny_files
    for command in commands():
        if command.startswith(SERVERS):
            continue
        # The same command on a tiny model, for fewer candidates.
        sizes = KEYS if "--space attention" in command else SMALL
        small = command.replace("--model demo", f"--model {model} --text {text} {sizes}")
        small = small.replace("s demo --texts demo", f"s {model} --texts {text} {SMALL}")
        small = re.sub(r"--time \w+", "--budget 8", re.sub(r"--budget \d+", "--budget 8", small))
        result = CliRunner().invoke(app, shlex.split(small)[1:])
        assert result.exit_code == 0, (command, result.output, result.exception)


def test_the_recipe_of_the_readme_is_the_published_one(tmp_path: Path) -> None:
    (text,) = [body for language, body in BLOCKS if language == "yaml"]
    path = tmp_path / "sparsegpt.yaml"
    path.write_text(text)
    shown, published = (Recipe.load(name).model_dump() for name in (path, "sparsegpt"))
    told = {key: value for key, value in shown.items() if key in text}
    assert len(told) > 8
    assert told == {key: published[key] for key in told}


def test_the_python_of_the_readme_runs(
    tiny_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, text = tiny_files
    blocks = [body for language, body in BLOCKS if language == "python"]
    assert blocks
    for body in blocks:
        small = body.replace('load_model("demo")', f'load_model("{model}")')
        small = small.replace('"demo"', f'"{text}"').replace(
            "Settings()", "Settings(16, 64, 64, 64)"
        )
        exec(compile(small, "README.md", "exec"), {})
