"""Commands say what was guessed about a text, what windows begin with, and each once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prunezero.report.tracking import tracker as track
from tests.cli.conftest import Run
from tests.cli.test_published import Untracked
from tests.tiny_models import save_tiny_model, tiny_tokenizer

SIZES = (
    "--sequence-length 16 --calibration-tokens 64 --evaluation-tokens 32 --test-tokens 32 "
    "--sparsity 0.5"
)


@pytest.mark.parametrize(
    "command",
    [
        "compare --recipes magnitude",
        "prune --recipe magnitude",
        "prune --recipe magnitude --memory-limit 1GiB --output {folder}/pruned",
    ],
)
def test_a_command_says_once_what_it_makes_of_a_text(
    command: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(track, "Tracker", Untracked)
    model = save_tiny_model("gemma3", tmp_path / "gemma")
    tiny_tokenizer("<s> $A").save_pretrained(model)
    rows = [*({"content": f"Document {place} of many."} for place in range(60)), {"content": None}]
    text = tmp_path / "t.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"{command} --model {model} --text {text} {SIZES} --json {tmp_path / 'out.json'}"
    result = run(words.format(folder=tmp_path))
    assert result.exit_code == 0, result.output
    told = (
        f"text {text}: documents stand in column 'content'; rows without text (null, empty or "
        "missing) are left out: 1"
    )
    assert result.output.splitlines().count(told) == 1
    assert result.output.count("windows of 16 tokens that begin with <s>; ") == 1
    written = json.loads((tmp_path / "out.json").read_text())
    for row in written.get("rows", [written]):
        assert row["windows_begin_with"] == "<s>"
