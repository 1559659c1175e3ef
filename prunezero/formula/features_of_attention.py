"""Features of what attention remembers: keys and values of the tokens seen so far, and their links.

Notation, of one key-value head: `k_j` and `v_j` are key and value of token `j` as the cache holds
them, `q_i` a query, `a_ij` the attention that token `i` pays to `j`, the mean over the query heads
that read the key-value head. All is float32, whatever the model computes in: norms of bfloat16 tie.
What a row says is told in `feature_row.py`. Of columns a text gives [key-value heads, keys] or
[keys]; of links [query heads, queries, keys] or [queries, keys].

What may be known is said by the cost: "activations" is work that grows with the number of keys;
"full map" is attention between all pairs, so whatever follows from it saves no work at a prompt;
"oracle" looks at tokens that are not there yet. The last two are simulations.
"""

from __future__ import annotations

from prunezero.formula.feature_row import Feature

_COLUMNS = ("kv_column",)
_BOTH = ("kv_column", "link")
_LINKS = ("link",)


def _column(
    name: str,
    meaning: str,
    latex: str,
    torch: str,
    cost: str = "activations",
    *,
    unit: str = "1",
    nonnegative: bool = True,
    domains: tuple[str, ...] = _COLUMNS,
) -> Feature:
    return Feature(name, "column", meaning, latex, unit, torch, cost, nonnegative, domains)


ATTENTION_FEATURES = (
    _column(
        "KN",
        "L2 norm of a key",
        r"\lVert k_j\rVert_2",
        "torch.linalg.vector_norm(keys, dim=-1)",
        unit="y",
        domains=_BOTH,
    ),
    _column(
        "VN",
        "L2 norm of a value",
        r"\lVert v_j\rVert_2",
        "torch.linalg.vector_norm(values, dim=-1)",
        unit="y",
        domains=_BOTH,
    ),
    _column(
        "VON",
        "L1 norm of a value behind the output projection, the mean over query heads that read it",
        r"\lVert W_o v_j\rVert_1",
        "output_norms",
        unit="y",
        domains=_BOTH,
    ),
    _column(
        "KDEV",
        "how little a key points where keys do: minus its cosine to the mean of their directions",
        r"-\cos(k_j, \overline{k/\lVert k\rVert})",
        "-torch.cosine_similarity(keys, torch.nn.functional.normalize(keys, dim=-1)"
        ".mean(-2, keepdim=True), dim=-1)",
        nonnegative=False,
    ),
    _column(
        "AGE",
        "how many tokens follow a key",
        r"n-1-j",
        "ages",
        "none",
    ),
    _column(
        "POS",
        "how many tokens stand before a key",
        "j",
        "positions",
        "none",
        domains=_BOTH,
    ),
    _column(
        "ATT_W",
        "attention that a key receives from the last queries, their mean, pooled over neighbours",
        r"\operatorname{pool}(\textstyle\frac1w\sum_{i\ge n-w} a_{ij})",
        "window_attention",
    ),
    _column(
        "ATT_LAST",
        "attention that a key receives from the last query",
        r"a_{n-1,j}",
        "last_attention",
    ),
    _column(
        "ATT_SUM",
        "attention that a key receives, summed over the queries that see it",
        r"\textstyle\sum_{i\ge j} a_{ij}",
        "attention_sum",
        "full map",
    ),
    _column(
        "ATT_MAX",
        "the most attention that a key receives from one query",
        r"\max_{i\ge j} a_{ij}",
        "attention_max",
        "full map",
    ),
    _column(
        "ATT_MEAN",
        "attention that a key receives, the mean over the queries that see it",
        r"\textstyle\frac{1}{n-j}\sum_{i\ge j} a_{ij}",
        "attention_sum / (ages + 1)",
        "full map",
    ),
    _column(
        "ATT_NEXT",
        "attention that a key receives from the tokens that follow the text, summed",
        r"\textstyle\sum_{i\ge n} a_{ij}",
        "next_attention",
        "oracle",
    ),
    _column(
        "ATT_READ",
        "the most attention that a key receives from one query when the text is read once more",
        r"\max_{i>n} a_{ij}",
        "reread_attention",
        "full map",
    ),
    _column(
        "EXPECTED",
        "attention that a key would receive from normally distributed queries of calibration text",
        r"\operatorname{softmax}_j(k_j^\top\mu_q/\sqrt d + k_j^\top\Sigma_q k_j/2d)",
        "((query_mean @ keys.mT) + 0.5 * ((keys[:, None] @ query_covariance) * keys[:, None])"
        ".sum(-1)).softmax(-1).mean(1)",
    ),
    _column(
        "STREAM",
        "how far a head's output moves on calibration text, beside its size, when it sees the "
        "first keys and the recent ones alone",
        r"\lVert o-o'\rVert_2^2/\lVert o\rVert_2^2",
        "streaming_error",
    ),
    _column(
        "LAGK",
        "how much a key's channels differ once scaled by the tokens that come next, in its chunk",
        r"\operatorname{softmax}(\operatorname{std}\tilde k_j)",
        "key_lag",
    ),
    _column(
        "LAGV",
        "how much a value's channels differ once scaled by the tokens that come next, in its chunk",
        r"\operatorname{softmax}(\operatorname{std}\tilde v_j)",
        "value_lag",
    ),
    _column(
        "RNDK",
        "a number from 0 to 1 that layer, head, token and seed decide, and nothing else",
        r"\xi_j",
        "column_noise",
        "none",
    ),
    Feature(
        "QK",
        "element",
        "what attention makes its softmax of: query times key, scaled",
        r"q_i^\top k_j/\sqrt d",
        "1",
        "logits",
        "full map",
        nonnegative=False,
        domains=_LINKS,
    ),
    Feature(
        "ATT",
        "element",
        "attention that a query pays to a key",
        r"a_{ij}",
        "1",
        "attention",
        "full map",
        domains=_LINKS,
    ),
    Feature(
        "PAGE",
        "element",
        "the most that a query's product with any key of a key's page can be, scaled",
        r"\textstyle\sum_c\max(q_{ic}\min_p k_c, q_{ic}\max_p k_c)/\sqrt d",
        "1",
        "page_bounds",
        "activations",
        nonnegative=False,
        domains=_LINKS,
    ),
    Feature(
        "BLOCK",
        "element",
        "what attention makes its softmax of, of the mean query of a block and the mean key of one",
        r"\bar q_{B(i)}^\top \bar k_{B(j)}/\sqrt d",
        "1",
        "block_products",
        "activations",
        nonnegative=False,
        domains=_LINKS,
    ),
    Feature(
        "DIST",
        "element",
        "how many tokens a key stands before a query",
        "i-j",
        "1",
        "distances",
        domains=_LINKS,
    ),
)
