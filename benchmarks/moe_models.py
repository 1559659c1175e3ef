"""Real mixtures of experts, made here: none is small enough to be at hand.

    python benchmarks/moe_models.py demo FOLDER --steps 200     # the demo model, its MLPs divided
    python benchmarks/moe_models.py small FOLDER --steps 1500   # a small one, trained from nothing
    python benchmarks/moe_models.py texts FOLDER                # the two texts of it alone
    python benchmarks/moe_models.py routing MODEL --texts A,B   # who is chosen, by text

`demo` divides the neurons of each MLP into experts of neurons that are active together, fits a
router to how much each expert would say, and trains experts and routers a little towards the dense
model, which no such model can beat. `small` learns two kinds of text, articles and Python code of
the standard library, so its experts come to differ by text. Both are saved as folders that plain
transformers reads; trained is on calibration text alone. `routing` writes how much of a text goes
to each expert, and the entropy of that in bits.

Sources: Zhang et al. 2022, MoEfication (ACL Findings), arXiv:2110.01786, for experts of a dense
model; Fedus et al. 2022, Switch Transformers, arXiv:2101.03961, for the loss that spreads load.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional

from prunezero.models.anatomy.experts import find_moe_layers
from prunezero.models.anatomy.linears import find_blocks
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.loading.load import load_model
from prunezero.models.text.demo import demo_documents
from prunezero.models.text.splits import load_text, windows

EXPERTS, CHOSEN = 8, 4
# Of the small model.
SMALL = {
    **{"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 32},
    **{"num_key_value_heads": 2, "intermediate_size": 64, "moe_intermediate_size": 64},
    **{"num_experts": 16, "num_experts_per_tok": 2, "norm_topk_prob": True},
    **{"max_position_embeddings": 512, "tie_word_embeddings": True, "rope_theta": 10000.0},
    **{"output_router_logits": True, "router_aux_loss_coef": 0.05},
}
VOCABULARY = 2048
LENGTH = 256
# Files of the standard library that are code, not data, and of a size that one can read.
SMALLEST, LARGEST = 2_000, 60_000

Loss = Callable[[Tensor], Tensor]


def main() -> None:
    """Make a model, its texts, or the table of its routing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["demo", "small", "texts", "routing"])
    parser.add_argument("folder", help="to write to; of `routing`, the model")
    parser.add_argument("--steps", type=int, help="of training; 200 of `demo`, 1500 of `small`")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--texts", default="demo", help="of `routing`, by commas")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    folder = Path(arguments.folder)
    if arguments.what == "texts":
        print(*write_texts(folder))
    elif arguments.what == "routing":
        print(json.dumps(routing(arguments.folder, arguments.texts.split(",")), indent=1))
    elif arguments.what == "demo":
        make_demo(folder, arguments.steps or 200)
    else:
        make_small(folder, arguments.steps or 1500)


def make_demo(folder: Path, steps: int) -> None:
    """The demo model with experts in place of its MLPs."""
    dense = load_model("demo", dtype="float32")
    text = load_text("demo")
    ids = windows(text, "calibration", dense, length=LENGTH, count=1024, seed=0)
    model = divided(dense, ids[:32])
    trained = [value for layer in find_moe_layers(model) for value in layer.module.parameters()]

    def distance(batch: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = dense.model(batch).logits.log_softmax(-1)
        found = model(batch).logits.log_softmax(-1)
        return functional.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean()

    train(model, trained, distance, ids, steps=steps, rate=3e-4, batch=2)
    save(model, dense.tokenizer, folder)


def divided(dense: LanguageModel, ids: Tensor) -> Any:
    """A Mixtral of the dense model's numbers, each MLP divided into experts with a router.

    Args:
        ids: token ids [count, length] on which neurons are seen.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    old = dense.model.config
    named = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    same = (*named, "vocab_size", "rms_norm_eps", "max_position_embeddings", "rope_parameters")
    width = old.intermediate_size // EXPERTS
    model = MixtralForCausalLM(
        MixtralConfig(
            **{key: getattr(old, key) for key in same},
            **{key: getattr(old, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
            head_dim=getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads,
            tie_word_embeddings=old.tie_word_embeddings,
            intermediate_size=width,
            num_local_experts=EXPERTS,
            num_experts_per_tok=CHOSEN,
            sliding_window=None,
        )
    )
    known = {key: value for key, value in dense.model.state_dict().items() if ".mlp." not in key}
    model.load_state_dict(known, strict=False)
    seen = observed(dense, ids)
    for layer, mlp, (inputs, active) in zip(
        find_moe_layers(model), mlps_of(dense), seen, strict=True
    ):
        fill(layer, mlp, inputs.float(), active.float())
    return model


def mlps_of(dense: LanguageModel) -> list[Any]:
    """The MLP of each block."""
    return [block.get_submodule("mlp") for block in find_blocks(dense.model)]


def observed(dense: LanguageModel, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each MLP its inputs [tokens, hidden] and its neurons [tokens, intermediate], in half."""
    mlps = mlps_of(dense)
    seen: list[list[list[Tensor]]] = [[[], []] for _ in mlps]
    handles = []
    for place, mlp in enumerate(mlps):
        for which, module in enumerate((mlp.gate_proj, mlp.down_proj)):

            def keep(module: nn.Module, args: Any, into: list[Tensor] = seen[place][which]) -> None:
                into.append(args[0][0].half())

            handles.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        for row in ids:
            dense.model.base_model(row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return [(torch.cat(inputs), torch.cat(active)) for inputs, active in seen]


def fill(layer: Any, mlp: Any, inputs: Tensor, active: Tensor) -> None:
    """Give the experts of a layer the neurons of an MLP, and fit its router.

    Args:
        inputs: what the MLP saw [tokens, hidden].
        active: what its neurons were [tokens, intermediate].
    """
    size = mlp.down_proj.weight.norm(dim=0)
    members = together(active.abs() * size)
    for place, own in enumerate(members):
        rows = torch.cat([mlp.gate_proj.weight[own], mlp.up_proj.weight[own]])
        layer.up[place] = rows
        # A token's weights are shares of one, where all of the MLP counted before.
        layer.down[place] = mlp.down_proj.weight[:, own] * CHOSEN
    said = torch.stack([(active[:, own] * size[own]).norm(dim=1) for own in members], dim=1)
    said = said - said.mean(dim=1, keepdim=True)
    gram = inputs.T @ inputs
    ridge = 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    router = torch.linalg.solve(gram + ridge, inputs.T @ said).T
    # Shares begin near one another, so that what is chosen counts as it did.
    layer.router_weight.copy_(0.3 * router / (inputs @ router.T).std())


def together(active: Tensor, *, rounds: int = 8) -> list[Tensor]:
    """Neurons in `EXPERTS` equal parts, those together that are active on the same tokens.

    k-means with as many places in each part as it needs, by linear assignment.

    Args:
        active: [tokens, neurons], how much each says.
    """
    shape = functional.normalize(active - active.mean(dim=0), dim=0)
    _, _, found = torch.svd_lowrank(shape, q=32, niter=2)
    points = functional.normalize(found * shape.norm(), dim=1)
    width = len(points) // EXPERTS
    centres = points[torch.randperm(len(points))[:EXPERTS]]
    own = torch.empty(0)
    for _ in range(rounds):
        costs = (-points @ centres.T).repeat_interleave(width, dim=1).numpy()
        own = torch.from_numpy(linear_sum_assignment(costs)[1] // width)
        centres = torch.stack([points[own == place].mean(dim=0) for place in range(EXPERTS)])
    return [torch.nonzero(own == place).flatten() for place in range(EXPERTS)]


def make_small(folder: Path, steps: int) -> None:
    """A small model that has learned two kinds of text."""
    from transformers import AutoConfig, AutoModelForCausalLM

    paths = write_texts(folder)
    texts = [load_text(str(path)) for path in paths]
    tokenizer = learned_tokenizer(
        document for text in texts for document in text.documents["calibration"]
    )
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "qwen3_moe", **SMALL, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0
        )
    )
    kinds = []
    for text in texts:
        joined = "\n\n".join(text.documents["calibration"])
        ids = torch.tensor(tokenizer(joined)["input_ids"])
        kinds.append(ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH))
    fewest = min(map(len, kinds))
    ids = torch.cat([kind[torch.randperm(len(kind))[:fewest]] for kind in kinds])

    def loss(batch: Tensor) -> Tensor:
        found: Tensor = model(batch, labels=batch).loss
        return found

    train(model, list(model.parameters()), loss, ids, steps=steps, rate=3e-3, batch=8)
    model.config.output_router_logits = False
    save(model.to(torch.bfloat16), tokenizer, folder)


def write_texts(folder: Path) -> list[Path]:
    """Articles and Python code, a file each, one document a line."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {"articles": demo_documents(), "code": list(python_files())}
    paths = []
    for kind, documents in kinds.items():
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        paths.append(path)
    return paths


def python_files() -> Iterator[str]:
    """Modules of the standard library, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts):
            text = path.read_text(errors="replace")
            if SMALLEST <= len(text) <= LARGEST:
                yield text


def learned_tokenizer(documents: Iterator[str]) -> Any:
    """A byte-level tokenizer of these documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def train(
    model: nn.Module,
    values: list[nn.Parameter],
    loss_of: Loss,
    ids: Tensor,
    *,
    steps: int,
    rate: float,
    batch: int,
) -> None:
    """AdamW for so many steps, the rate falling to nothing; told about ten times."""
    model.train().requires_grad_(False)
    for value in values:
        value.requires_grad_(True)
    optimizer = torch.optim.AdamW(values, lr=rate, weight_decay=0.01)
    begin, recent = time.perf_counter(), list[float]()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * max(0.02, 1 - step / steps)
        loss = loss_of(ids[torch.randint(len(ids), (batch,))])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(values, 1.0)
        optimizer.step()
        recent.append(float(loss.detach()))
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            spent = time.perf_counter() - begin
            print(f"{spent:6.0f} s, step {step + 1}, loss {np.mean(recent[-20:]):.3f}", flush=True)
    model.eval().requires_grad_(False)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """A folder that plain transformers reads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{sum(value.numel() for value in model.parameters()) / 1e6:.1f} M numbers in {folder}")


def routing(name: str, texts: list[str], *, tokens: int = 16384) -> dict[str, Any]:
    """Of each text and layer, the share of choices that each expert has, and their entropy."""
    language_model = load_model(name, dtype="float32")
    layers = find_moe_layers(language_model.model)
    told: dict[str, Any] = {}
    for text in texts:
        count = tokens // LENGTH
        ids = windows(load_text(text), "test", language_model, length=LENGTH, count=count, seed=0)
        counts = [torch.zeros(layer.count) for layer in layers]
        handles = []
        for layer, into in zip(layers, counts, strict=True):

            def count_choices(
                module: nn.Module, args: Any, result: Any, into: Tensor = into
            ) -> None:
                into += torch.bincount(result[2].flatten(), minlength=len(into))

            handles.append(layer.router.register_forward_hook(count_choices))
        with torch.no_grad():
            losses = [float(language_model.model(row[None], labels=row[None]).loss) for row in ids]
        for handle in handles:
            handle.remove()
        shares = [one / one.sum() for one in counts]
        told[text] = {
            "perplexity": round(float(np.exp(np.mean(losses))), 3),
            "bits": [round(float(-(one * one.clamp(min=1e-12).log2()).sum()), 3) for one in shares],
            "shares": [[round(float(value), 4) for value in one] for one in shares],
        }
    return told


if __name__ == "__main__":
    main()
