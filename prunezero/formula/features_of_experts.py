"""Features of experts: what a router sends them, what they make of it, and what they weigh.

Notation: of an expert `e` and a token routed to it, `g` is the weight that the router gives `e`, as
the model uses it (whether the weights of the chosen add up to 1 says its configuration), and `f`
what `e` makes of the token before that weight. Sums run over the tokens routed to `e`, and are
divided by all tokens, so that no value depends on how much text there was; `N` is the share of
tokens, so `GF / N` is a mean over those routed. What a row says is told in `feature_row.py`.
"""

from __future__ import annotations

from prunezero.formula.feature_row import Feature

# Squares of all weights of an expert, and how many there are.
_SQUARES = (
    "(torch.linalg.vector_norm(up, dim=(1, 2), dtype=torch.float64).square()"
    " + torch.linalg.vector_norm(down, dim=(1, 2), dtype=torch.float64).square())"
)
_SIZES = "(up.abs().sum((1, 2), dtype=torch.float64) + down.abs().sum((1, 2), dtype=torch.float64))"
_COUNT = "(up[0].numel() + down[0].numel())"


def _row(
    name: str, meaning: str, latex: str, unit: str, torch: str, cost: str = "activations"
) -> Feature:
    return Feature(name, "row", meaning, latex, unit, f"({torch})", cost, domains=("expert",))


EXPERT_FEATURES = (
    _row(
        "N",
        "share of the tokens that the router sends to an expert",
        r"n_e",
        "1",
        "routed_count / tokens",
    ),
    _row(
        "GATE",
        "router's weights of an expert, summed over tokens routed to it, per token of the text",
        r"\textstyle\sum g_e",
        "1",
        "gate_sum / tokens",
    ),
    _row(
        "GATE2",
        "squares of the router's weights of an expert, summed as GATE is",
        r"\textstyle\sum g_e^2",
        "1",
        "gate_square_sum / tokens",
    ),
    _row(
        "SOFT",
        "mean over all tokens of the softmax over all experts of the router's logits",
        r"\overline{p_e}",
        "1",
        "soft_sum / tokens",
    ),
    _row(
        "F1",
        "L2 norms of an expert's outputs, summed over tokens routed to it, per token of the text",
        r"\textstyle\sum\lVert f_e\rVert",
        "y",
        "norm_sum / tokens",
    ),
    _row(
        "F2",
        "squared L2 norms of an expert's outputs, summed as F1 is",
        r"\textstyle\sum\lVert f_e\rVert^2",
        "y^2",
        "norm_square_sum / tokens",
    ),
    _row(
        "GF",
        "L2 norms of what an expert adds to the layer's output, weighted by the router, as F1",
        r"\textstyle\sum g_e\lVert f_e\rVert",
        "y",
        "gated_norm_sum / tokens",
    ),
    _row(
        "GF2",
        "squared L2 norms of what an expert adds to the layer's output, summed as F1 is",
        r"\textstyle\sum g_e^2\lVert f_e\rVert^2",
        "y^2",
        "gated_norm_square_sum / tokens",
    ),
    _row(
        "TGF",
        "GF with each token counted by 1 - cosine of the stream with and without routed experts",
        r"\textstyle\sum\tau\,g_e\lVert f_e\rVert",
        "y",
        "turned_gated_norm_sum / tokens",
    ),
    # Rounding may take a variance a little below zero.
    _row(
        "FVAR",
        "variance of an expert's outputs over tokens routed to it, summed over channels",
        r"\operatorname{var}(f_e)",
        "y^2",
        "(norm_square_sum - expert_output_sum.square().sum(1) / routed_count.clamp(min=1.0))"
        ".clamp(min=0.0) / routed_count.clamp(min=1.0)",
    ),
    _row(
        "AMAX",
        "largest |activation| inside an expert, of what its second matrix reads",
        r"\max|a_e|",
        "x",
        "largest_activations.amax(0)",
    ),
    _row(
        "CO",
        "largest share of an expert's tokens that some other one is sent as well",
        r"\max_{e'}n_{ee'}/n_e",
        "1",
        "(together_count - torch.diag(together_count.diagonal())).amax(1)"
        " / routed_count.clamp(min=1.0)",
    ),
    _row(
        "W1",
        "mean |weight| of an expert's matrices",
        r"\overline{|W_e|}",
        "w",
        f"{_SIZES} / {_COUNT}",
        "none",
    ),
    _row(
        "W2",
        "root mean square of the weights of an expert's matrices",
        r"\operatorname{rms}(W_e)",
        "w",
        f"({_SQUARES} / {_COUNT}).sqrt()",
        "none",
    ),
    _row(
        "ROUTER",
        "L2 norm of the router's row of an expert",
        r"\lVert r_e\rVert",
        "w",
        "torch.linalg.vector_norm(router, dim=1, dtype=torch.float64)",
        "none",
    ),
    _row(
        "LOO",
        "change of the layer's output without an expert, others chosen in its place: its Frobenius "
        "norm, summed over sequences",
        r"\lVert F_{\setminus e}(X)-F(X)\rVert_F",
        "y",
        "loss_without_expert",
        "oracle",
    ),
)
