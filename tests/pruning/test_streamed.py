"""Pruning from files to files gives the bytes that pruning in memory gives, whatever happens."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunezero.errors import ModelError, OutputError, RecipeError, SelectionError, TextError
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.load import load_model
from prunezero.models.observing.calibration import calibrate
from prunezero.models.saving.mirror import Mirror
from prunezero.models.saving.resumable import ResumableCheckpoint
from prunezero.models.saving.save import count_sparsity, save_model
from prunezero.models.streaming.streamed_model import StreamedModel
from prunezero.models.text.splits import load_text, windows
from prunezero.pruning import streamed
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.streamed import StreamedOutcome, prune_streamed
from tests.tiny_models import save_tiny_model, tiny_batches, tiny_network, tiny_tokenizer

WINDOWS = tiny_batches(3, 16)


def recipe(criterion: str = "abs(W) * X", **choices: object) -> Recipe:
    fields = {"name": "mine", "criterion": criterion, "statistics": "sequential", **choices}
    return Recipe.model_validate(fields)


RECIPES = {
    "inputs": recipe(),
    "mended": recipe("W**2 / U**2", compare="8 columns", update="obs"),
    "pattern": recipe(pattern="2:4", statistics="dense"),
    "weights alone": recipe("abs(W)", compare="layer"),
    "dense": recipe(
        statistics="dense", allocate={"table": {"ratios": {"q_proj": 1.5, "down_proj": 0}}}
    ),
    "some": recipe(targets=["re:layers.1.*proj"], update=["swaps"]),
}


def save_sharded(folder: Path, family: str, *, dtype: torch.dtype, **changes: Any) -> Path:
    network = tiny_network(family, **changes).to(dtype)
    network.save_pretrained(folder, max_shard_size="20KB")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of three blocks."""
    changes = {"num_hidden_layers": 3, "tie_word_embeddings": False}
    return save_sharded(tmp_path / "dense", "llama", dtype=torch.float32, **changes)


def run(
    source: Path, output: Path, chosen: Recipe = RECIPES["inputs"], dtype: str = "auto"
) -> StreamedOutcome:
    return prune_streamed(source, chosen, 0.5, output, windows=WINDOWS, dtype=dtype, device="cpu")


def stored(folder: Path) -> dict[str, Tensor]:
    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def digests(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
    }


def assert_streamed_as_in_memory(folder: Path, dtype: str, chosen: Recipe, work: Path) -> None:
    result = run(folder, work / "streamed", chosen, dtype)
    whole = load_model(str(folder), dtype=dtype, device="cpu")
    layers = find_linears(whole.model, targets=chosen.targets)
    known = calibrate(whole, WINDOWS, layers, dense_sums([chosen]))
    expected = prune(whole, chosen, 0.5, statistics=known, windows=WINDOWS)
    save_model(whole, work / "in memory", files={"recipe.yaml": chosen.to_yaml()})
    assert digests(work / "streamed") == digests(work / "in memory")
    assert (result.outcome.zeros, result.outcome.total) == (expected.zeros, expected.total)
    assert result.folder == work / "streamed"
    saved = count_sparsity(work / "streamed", [layer.name for layer in layers])
    assert saved.zeros == expected.zeros
    assert sorted(path.name for path in work.iterdir()) == ["dense", "in memory", "streamed"]


@pytest.mark.parametrize("kind", RECIPES)
def test_every_kind_of_recipe_gives_the_bytes_that_pruning_in_memory_gives(
    kind: str, source: Path, tmp_path: Path
) -> None:
    assert_streamed_as_in_memory(source, "float32", RECIPES[kind], tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_every_layout_gives_the_bytes_that_pruning_in_memory_gives(
    family: str, is_tied: bool, dtype: str, tmp_path: Path
) -> None:
    changes = {"tie_word_embeddings": is_tied}
    save_sharded(tmp_path / "dense", family, dtype=getattr(torch, dtype), **changes)
    assert_streamed_as_in_memory(tmp_path / "dense", dtype, RECIPES["mended"], tmp_path)


def test_biases_are_mended_where_the_files_have_them(tmp_path: Path) -> None:
    save_sharded(tmp_path / "dense", "gpt2", dtype=torch.float32)
    assert_streamed_as_in_memory(tmp_path / "dense", "float32", recipe(update="bias"), tmp_path)


def test_the_result_loads_in_plain_transformers_and_here(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ours = load_model(str(tmp_path / "out"), dtype="float32", device="cpu")
    with torch.no_grad():
        assert torch.equal(plain(WINDOWS).logits, ours.model(WINDOWS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Ab")["input_ids"] == [36, 69]
    assert Recipe.load(tmp_path / "out" / "recipe.yaml") == RECIPES["inputs"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((source / "config.json").read_text())


def test_tied_weights_stay_tied_and_are_written_once(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "dense")
    run(tmp_path / "dense", tmp_path / "out")
    assert "lm_head.weight" not in stored(tmp_path / "out")
    model = load_model(str(tmp_path / "out"), dtype="float32", device="cpu").model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_the_files_keep_the_dtype_of_the_source(tmp_path: Path) -> None:
    save_sharded(tmp_path / "dense", "llama", dtype=torch.float16)
    run(tmp_path / "dense", tmp_path / "out", RECIPES["mended"])
    after = stored(tmp_path / "out")
    assert {value.dtype for value in after.values()} == {torch.float16}
    # Worked in float32: a mask chosen in memory in that dtype is the same.
    whole = load_model(str(tmp_path / "dense"), dtype="float32", device="cpu")
    first = find_linears(whole.model, targets=["re:layers.0.*q_proj"])[0]
    prune(whole, RECIPES["mended"], 0.5, windows=WINDOWS)
    assert torch.equal(after[f"{first.name}.weight"], first.weight.half())


def interrupted_after(place: int) -> Callable[..., None]:
    """What notes that a part is finished, stopped when the part at a place is in the files."""
    usual = ResumableCheckpoint._finish

    def finish(self: ResumableCheckpoint, at: int) -> None:
        if at == place:
            raise KeyboardInterrupt
        usual(self, at)

    return finish


def interrupted_within(place: int) -> Callable[..., None]:
    """What puts tensors in their places, stopped in the middle of the part at a place."""
    usual = Mirror.write
    blocks: list[str] = []

    def write(self: Mirror, name: str, tensor: Tensor) -> None:
        block = name.split(".layers.")[1][0]
        is_second = blocks[-1:] == [block]
        blocks.append(block)
        if len(set(blocks)) == place and is_second:
            usual(self, name, torch.full_like(tensor, 7))
            raise KeyboardInterrupt
        usual(self, name, tensor)

    return write


def interrupted_copy(self: Mirror, name: str) -> None:
    """What copies a tensor, stopped at the first."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["mended", "pattern"])
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("is_within", [False, True])
def test_a_run_stopped_anywhere_goes_on_to_the_same_files(
    is_within: bool,
    place: int,
    kind: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(source, tmp_path / "whole", RECIPES[kind])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if not is_within:
            patch.setattr(ResumableCheckpoint, "_finish", interrupted_after(place))
        elif place == 0:
            patch.setattr(Mirror, "copy", interrupted_copy)
        else:
            patch.setattr(Mirror, "write", interrupted_within(place))
        run(source, tmp_path / "stopped", RECIPES[kind])
    assert not (tmp_path / "stopped").exists()
    result = run(source, tmp_path / "stopped", RECIPES[kind])
    assert result.blocks_before == max(0, place - 1)
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")
    assert not (tmp_path / "stopped.partial").exists()


def test_a_run_stopped_before_it_is_published_has_nothing_left_to_prune(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "whole")

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ResumableCheckpoint, "publish", stop)
        run(source, tmp_path / "stopped")
    monkeypatch.setattr(streamed, "prune_layers", stop)
    monkeypatch.setattr(streamed, "BlockWalk", stop)
    assert run(source, tmp_path / "stopped").blocks_before == 3
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")


def test_a_report_sees_the_finished_checkpoint_before_it_appears(
    source: Path, tmp_path: Path
) -> None:
    seen: list[StreamedOutcome] = []
    output = tmp_path / "out"

    def report(done: StreamedOutcome) -> dict[str, str]:
        load_model(str(done.folder), dtype="float32", device="cpu")
        seen.append(done)
        if len(seen) == 1:
            raise KeyboardInterrupt
        assert not output.exists()
        return {"README.md": "measured"}

    def again() -> StreamedOutcome:
        chosen = RECIPES["inputs"]
        return prune_streamed(
            source, chosen, 0.5, output, windows=WINDOWS, device="cpu", report=report
        )

    with pytest.raises(KeyboardInterrupt):
        again()
    assert not output.exists()
    result = again()
    assert (result.blocks_before, result.folder) == (3, output)
    assert seen[1].folder != output and seen[1].outcome == result.outcome
    assert (output / "README.md").read_text() == "measured"
    assert not (tmp_path / "out.partial").exists()


KILLING = """
import hashlib, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.streamed import prune_streamed

torch.set_num_threads(1)
source, work = map(Path, sys.argv[1:])
chosen = Recipe.model_validate({
    "name": "mine", "criterion": "W**2 / U**2", "statistics": "sequential", "update": "obs",
    "compare": "8 columns",
})
ids = torch.arange(64).reshape(2, 32) % 90

def started(output):
    child = os.fork()
    if child == 0:
        prune_streamed(source, chosen, 0.5, output, windows=ids, device="cpu")
        os._exit(0)
    return child

def digests(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}

def ended(child):
    # It stays to be waited for.
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

def written():
    try:
        return int((work / "out.partial/finished").read_text())
    except (OSError, ValueError):
        return 0

def check_same(output):
    found = digests(output)
    differing = {name for name in {*found, *whole} if found.get(name) != whole.get(name)}
    assert not differing, differing
    shutil.rmtree(output)
    shutil.rmtree(f"{output}.partial", ignore_errors=True)

# The first run also loads libraries, so the second one says how long a run takes.
for name in ("warm", "whole"):
    begin = time.perf_counter()
    prune_streamed(source, chosen, 0.5, work / name, windows=ids, device="cpu")
seconds = time.perf_counter() - begin
whole = digests(work / "whole")
rng, output, shards = random.Random(0), work / "out", []
while len(shards) < 6:
    enough = written() + rng.randint(0, 3)
    child = started(output)
    # Moments count from what is written, so that a busy machine cannot make all of them too early.
    while written() < enough and not (output.exists() or ended(child)):
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.15) * seconds)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    # One that was killed may have published everything.
    if output.exists():
        check_same(output)
    elif status:
        shards.append(written())
assert os.waitpid(started(output), 0)[1] == 0
check_same(output)
print(*shards)
"""


def test_a_process_killed_at_random_moments_ends_with_the_same_files(tmp_path: Path) -> None:
    source = save_tiny_model("llama", tmp_path / "dense", num_hidden_layers=10)
    result = subprocess.run(
        [sys.executable, "-c", KILLING, source, tmp_path], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    shards = list(map(int, result.stdout.split()))
    # Killed early, killed in between: the moments are worth something.
    assert len(shards) == 6 and len(set(shards)) > 2 and max(shards) > 1


@pytest.fixture
def begun(source: Path, tmp_path: Path) -> Path:
    """The output of a run that was stopped behind its first block, and is not there yet."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ResumableCheckpoint, "_finish", interrupted_after(2))
        run(source, tmp_path / "out")
    return tmp_path / "out"


def test_half_written_files_of_a_killed_process_are_not_published(
    source: Path, begun: Path
) -> None:
    (Path(f"{begun}.partial") / "model" / ".tmpOqjVuZ").write_bytes(b"half a shard")
    run(source, begun)
    assert not list(begun.glob(".*"))


def test_another_request_does_not_go_on_in_the_same_place(
    source: Path, begun: Path, tmp_path: Path
) -> None:
    changed = save_tiny_model("llama", tmp_path / "changed", seed=1, num_hidden_layers=3)
    for message, other, fraction, text in (
        ("sparsity: 0.5, now 0.6", source, 0.6, WINDOWS),
        ("windows: .*, now .*", source, 0.5, WINDOWS[:2]),
        ("source: .*, now .*", changed, 0.5, WINDOWS),
    ):
        with pytest.raises(OutputError, match=rf"another request \({message}\)"):
            prune_streamed(other, RECIPES["inputs"], fraction, begun, windows=text, device="cpu")
    assert run(source, begun).blocks_before == 1


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (recipe("abs(W) * G", statistics="dense"), "formula takes gradients"),
        (recipe("abs(W)", compare="model", statistics="dense"), "compare 'model' ranks"),
        (recipe(allocate="owl"), "allocate owl looks at all blocks"),
        (recipe(schedule="iterative"), "schedule iterative prunes the model several times"),
        (recipe(recover="tune"), "recover tune trains all blocks together"),
        (recipe(pattern="2:4", permute="heuristic"), "permute heuristic reorders"),
        (recipe(update="bias"), "layer 'model.layers.0.self_attn.q_proj' has none"),
    ],
)
def test_choices_that_need_the_whole_model_are_refused(
    chosen: Recipe, message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        run(source, tmp_path / "out", chosen)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_bad_requests_are_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(RecipeError, match="needs calibration text"):
        prune_streamed(source, recipe(), 0.5, output)
    with pytest.raises(SelectionError, match="say how much to remove"):
        prune_streamed(source, recipe(), None, output, windows=WINDOWS)
    with pytest.raises(TextError, match="longer than the 64"):
        prune_streamed(source, recipe(), 0.5, output, windows=tiny_batches(1, 65))
    with pytest.raises(ModelError, match="is not a model folder"):
        prune_streamed(tmp_path, recipe(), 0.5, output, windows=WINDOWS)
    with pytest.raises(ModelError, match="dtype must be auto, float32 or bfloat16 but is 'half'"):
        prune_streamed(source, recipe(), 0.5, output, windows=WINDOWS, dtype="half")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    with pytest.raises(OutputError, match="is not empty"):
        run(source, source)


def test_too_small_a_memory_is_refused_with_the_figures(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"takes about .* MiB \(weights .*block.*limit is 0.1 MiB"):
        prune_streamed(
            source, recipe(), 0.5, tmp_path / "out", windows=WINDOWS, memory_limit=100_000
        )
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_an_open_streamed_model_cuts_its_own_calibration_windows(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"Line {place} of a text." for place in range(99))
    )
    opened = StreamedModel(source, device="cpu")
    text = load_text(str(tmp_path / "text.txt"))
    ids = windows(text, "calibration", opened.language_model, length=16, count=2)
    told: list[tuple[str, int, int]] = []

    def tell(what: str, done: int, total: int) -> None:
        told.append((what, done, total))

    result = prune_streamed(opened, recipe(), 0.5, tmp_path / "out", windows=ids, progress=tell)
    assert result.outcome.sparsity_reached == 0.5
    assert told == [("blocks pruned", done, 3) for done in (1, 2, 3)]


PROGRAM = """
import sys
import torch
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.streamed import prune_streamed

torch.set_num_threads(1)
small, large, output, limit = sys.argv[1:]
chosen = Recipe.model_validate(
    {"name": "mine", "criterion": "abs(W) * X", "statistics": "sequential"}
)
ids = torch.arange(32).reshape(2, 16) % 90
# Libraries are loaded, and their own memory is taken, before the measurement.
prune_streamed(small, chosen, 0.5, output + "-small", windows=ids, device="cpu")
result = prune_streamed(
    large, chosen, 0.5, output, windows=ids, device="cpu", memory_limit=int(limit)
)
print(result.peak_bytes, result.need.total)
"""


def test_memory_stays_below_the_limit_and_far_below_the_size_of_the_model(tmp_path: Path) -> None:
    changes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 20}
    small = save_tiny_model("llama", tmp_path / "small")
    large = save_tiny_model("llama", tmp_path / "large", **changes)
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    limit = size // 2
    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM, small, large, tmp_path / "out", str(limit)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    peak_bytes, need = map(int, printed.split())
    assert 0 < peak_bytes < limit
    assert need < limit
