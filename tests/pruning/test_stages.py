"""Prunings of several stages that are stopped, killed and taken up again."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prunezero.errors import OutputError
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from prunezero.pruning import stages
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recovery import training
from prunezero.pruning.stages import Stages
from tests.tiny_models import tiny_batches, tiny_model, tiny_network, tiny_tokenizer

BATCHES = tiny_batches(6, 12)
REQUEST = {"model": "one", "sparsity": 0.5, "recipe": "name: mine\n"}
ORDER = [(0, "pruned"), (0, "tuned"), (1, "pruned"), (1, "tuned")]


def model_of(family: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    return wrap_model(tiny_network(family).to(dtype), tiny_tokenizer(), name=family)


def digest(model: LanguageModel) -> str:
    tensors = model.model.state_dict().values()
    return hashlib.sha256(
        b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)
    ).hexdigest()


def opened(model: LanguageModel, folder: Path | None, **changes: object) -> Stages:
    return Stages(folder, REQUEST | changes, find_linears(model.model))


def kept_stages(folder: Path, model: LanguageModel, count: int) -> None:
    """The first stages of `ORDER`, each with other weights; those of the last are in the model."""
    known = opened(model, folder)
    for place, stage in enumerate(ORDER[:count]):
        for layer in find_linears(model.model):
            layer.weight.fill_(place + 0.5)
            if layer.bias is not None:
                layer.bias.fill_(-place - 0.25)
        known.keep(*stage)


@pytest.mark.parametrize("count", range(5))
@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16)])
def test_the_weights_of_the_last_finished_stage_come_back(
    family: str, dtype: torch.dtype, count: int, tmp_path: Path
) -> None:
    left, taken_up = model_of(family, dtype), model_of(family, dtype)
    kept_stages(tmp_path / "new" / "folder", left, count)
    known = opened(taken_up, tmp_path / "new" / "folder")
    assert digest(taken_up) == digest(left)
    assert [known.has(*stage) for stage in ORDER] == [place < count for place in range(4)]


def test_a_pruned_step_lies_behind_without_a_tuned_one(tmp_path: Path) -> None:
    known = opened(tiny_model(), tmp_path)
    known.keep(0, "pruned")
    known.keep(1, "pruned")
    assert known.has(0, "tuned") and known.has(1, "pruned") and not known.has(1, "tuned")


def test_weights_of_one_stage_alone_are_on_disk(tmp_path: Path) -> None:
    kept_stages(tmp_path, tiny_model(), 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "request.json",
        "step-1-pruned.safetensors",
    ]


def test_without_a_folder_stages_are_counted_and_nothing_is_written(tmp_path: Path) -> None:
    known = opened(tiny_model(), None)
    assert not known.has(0, "pruned")
    known.keep(0, "pruned")
    assert known.has(0, "pruned") and not known.has(0, "tuned")
    assert known.checkpoint(0) is None
    assert not list(tmp_path.iterdir())


def test_another_request_is_refused_by_what_differs(tmp_path: Path) -> None:
    kept_stages(tmp_path, tiny_model(), 1)
    model = tiny_model()
    before = digest(model)
    with pytest.raises(OutputError, match=r"another request \(sparsity: 0\.5, now 0\.7\)"):
        opened(model, tmp_path, sparsity=0.7)
    with pytest.raises(OutputError, match=r"seed: None, now 3.*finish that one.*delete"):
        opened(model, tmp_path, seed=3)
    assert digest(model) == before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"request": 3}',
        '{"request": {}, "finished": 3}',
        '{"request": {}, "finished": [0]}',
        '{"request": {}, "finished": [0, "pruned", 1]}',
    ],
)
def test_a_damaged_request_is_refused(text: str, tmp_path: Path) -> None:
    kept_stages(tmp_path, tiny_model(), 1)
    (tmp_path / "request.json").write_text(text)
    with pytest.raises(OutputError, match=r"request\.json is damaged .*delete its folder"):
        opened(tiny_model(), tmp_path)


def test_bytes_that_are_no_text_are_a_damaged_request(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(OutputError, match="damaged"):
        opened(tiny_model(), tmp_path)


def test_weights_that_are_cut_off_or_gone_or_of_other_layers_are_refused(tmp_path: Path) -> None:
    kept_stages(tmp_path, tiny_model(), 1)
    path = tmp_path / "step-0-pruned.safetensors"
    with pytest.raises(OutputError, match="safetensors' is damaged"):
        opened(tiny_model("gpt2"), tmp_path)
    with pytest.raises(OutputError, match="safetensors' is damaged"):
        opened(tiny_model(intermediate_size=48), tmp_path)
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(OutputError, match="safetensors' is damaged.*delete its folder"):
            opened(tiny_model(), tmp_path)
    path.unlink()
    with pytest.raises(OutputError, match="safetensors' is damaged"):
        opened(tiny_model(), tmp_path)


def test_weights_with_a_flipped_bit_are_refused(tmp_path: Path) -> None:
    kept_stages(tmp_path, tiny_model(), 3)
    path = tmp_path / "step-1-pruned.safetensors"
    content = bytearray(path.read_bytes())
    content[-99] ^= 4
    path.write_bytes(content)
    with pytest.raises(OutputError, match="it is not what was written.*delete its folder"):
        opened(tiny_model(), tmp_path)


def test_a_stage_that_nobody_knows_is_damage(tmp_path: Path) -> None:
    kept_stages(tmp_path, tiny_model(), 1)
    text = json.dumps({"request": REQUEST, "finished": [0, "polished"]})
    (tmp_path / "request.json").write_text(text)
    with pytest.raises(OutputError, match="damaged"):
        opened(tiny_model(), tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(OutputError, match=r"file.*' cannot be written"):
            opened(tiny_model(), folder)


def test_weights_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    known = opened(tiny_model(), tmp_path)
    (tmp_path / "step-0-pruned.safetensors" / "in the way").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"step-0-pruned\.safetensors' cannot be written"):
        known.keep(0, "pruned")


def test_a_stage_counts_once_its_note_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_stages(tmp_path, tiny_model(), 1)
    model = tiny_model()
    known = opened(model, tmp_path)
    first = digest(model)
    find_linears(model.model)[0].weight.zero_()

    def full_disk(text: str, path: Path) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "replace_text", full_disk)
        with pytest.raises(OutputError, match="no space left"):
            known.keep(0, "tuned")
    again = tiny_model()
    assert not opened(again, tmp_path).has(0, "tuned")
    assert digest(again) == first


CASES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "llama": ("llama", torch.float32, {}),
    "gpt2 in bfloat16": ("gpt2", torch.bfloat16, {"update": ["obs", "bias"]}),
}


def recipe_of(case: str, **changes: Any) -> Recipe:
    fields = Recipe.load("prune_and_tune").model_dump(by_alias=True) | CASES[case][2] | changes
    fields["schedule"] = {"iterative": {"steps": 2}}
    fields["recover"] = {"tune": {"sequences": 6, "batch": 2, "learning_rate": 0.01}}
    return Recipe.model_validate(fields)


def pruned(case: str, folder: Path | None, progress: Any = None) -> tuple[str, int]:
    """A fresh model, pruned and tuned in two steps: the digest of its weights, and its zeros."""
    model = model_of(*CASES[case][:2])
    call: dict[str, Any] = {"windows": BATCHES, "folder": folder, "progress": progress}
    zeros = prune(model, recipe_of(case), 0.6, **call).zeros
    return digest(model), zeros


class StopError(Exception):
    """Ends a pruning from outside."""


@pytest.mark.parametrize("case", CASES)
def test_a_pruning_stopped_anywhere_ends_in_the_same_bits(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "KEEP_EVERY", 2)
    calls: list[str] = []
    whole = pruned(case, None, lambda what, done, total: calls.append(what))
    # Two blocks and three steps of the optimizer, twice.
    assert len(calls) == 10
    for last in range(1, 11):
        left = [last]

        def stop(what: str, done: int, total: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise StopError

        folder = tmp_path / str(last)
        with pytest.raises(StopError):
            pruned(case, folder, stop)
        told: list[str] = []
        assert pruned(case, folder, lambda what, *counts, told=told: told.append(what)) == whole
        # What was finished is not done again.
        assert len(told) <= 10 - 2 * (last > 2) - 3 * (last > 5) - 2 * (last > 7)


def test_a_finished_pruning_is_only_read_again(tmp_path: Path) -> None:
    whole = pruned("llama", tmp_path)
    told: list[str] = []
    again = pruned("llama", tmp_path, lambda what, done, total: told.append(what))
    assert again == whole and not told


def test_the_same_folder_serves_no_other_call(tmp_path: Path) -> None:
    pruned("llama", tmp_path)
    call: dict[str, Any] = {"language_model": tiny_model(), "recipe": recipe_of("llama")}
    call |= {"sparsity": 0.6, "windows": BATCHES, "folder": tmp_path}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"sparsity": 0.5}, r"\(sparsity: 0\.6, now 0\.5\)"),
        ({"windows": BATCHES.flip(0)}, r"\(text: "),
        ({"language_model": tiny_model(seed=1)}, r"\(model: "),
        (
            {"recipe": recipe_of("llama", damping=0.02)},
            r"recipe: damping: 0\.01, now damping: 0\.02",
        ),
        (
            {"recipe": recipe_of("llama", ignore=["q_proj"])},
            "recipe: nothing, now ignore: - q_proj",
        ),
    ]
    for change, told in changes:
        with pytest.raises(OutputError, match=f"another request .*{told}"):
            prune(**(call | change))


def test_text_cut_into_other_windows_is_another_request(tmp_path: Path) -> None:
    pruned("llama", tmp_path)
    chosen, windows = recipe_of("llama"), BATCHES.view(12, 6)
    with pytest.raises(OutputError, match="another request"):
        prune(tiny_model(), chosen, 0.6, windows=windows, folder=tmp_path)


def test_rows_that_a_permutation_moved_in_other_layers_come_back_too(tmp_path: Path) -> None:
    # The rows of gate and up follow the columns of down, though they are not pruned.
    fields: dict[str, Any] = {"name": "mine", "criterion": "abs(W)", "pattern": "2:4"}
    fields |= {"permute": "assignment", "targets": ["down_proj"]}
    fields |= {"recover": {"tune": {"sequences": 4}}}
    recipe = Recipe.model_validate(fields)
    whole, left, taken_up = tiny_model(), tiny_model(), tiny_model()
    prune(whole, recipe, windows=BATCHES)

    def stop(what: str, done: int, total: int) -> None:
        if "tuning" in what:
            raise StopError

    with pytest.raises(StopError):
        prune(left, recipe, windows=BATCHES, folder=tmp_path, progress=stop)
    prune(taken_up, recipe, windows=BATCHES, folder=tmp_path)
    assert digest(taken_up) == digest(whole)


def kill_at(place: int, *, after: bool) -> None:
    """Let this process end by SIGKILL before or after its n-th file is put in place."""
    replace, count = os.replace, 0

    def replacing(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count < place or after:
            replace(source, target)
        if count == place:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replacing  # type: ignore[assignment]


def kill_everywhere(folder: Path) -> None:
    """Print the digests of an uninterrupted pruning and of those killed and taken up again."""
    training.KEEP_EVERY = 2
    print(pruned("llama", None)[0])
    place, was_killed = 0, True
    while was_killed:
        place += 1
        child = os.fork()
        if not child:
            kill_at(place, after=place % 2 == 0)
            pruned("llama", folder / str(place))
            os._exit(0)
        was_killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        print(pruned("llama", folder / str(place))[0])


def test_a_killed_pruning_ends_in_the_same_bits(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from tests.pruning.test_stages import kill_everywhere\n"
        "kill_everywhere(Path(sys.argv[1]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    digests = run.stdout.split()
    # One alone, one for each file (the request; of both steps two for either stage and three
    # checkpoints), and one whose last file was not reached.
    assert len(digests) == 1 + (1 + 2 * (2 + 2 + 3)) + 1
    assert len(set(digests)) == 1
