"""What is measured of a pruned model beside perplexity? Columns of results, by name.

`evaluation.py` says how. Here, since tables and objectives know the names without torch.
"""

from __future__ import annotations

# Shares of tokens, higher is better: of several the plain mean says what they are together.
SHARES = ("top1_agreement", "top5_agreement", "acceptance")
# All that is measured against the dense model; KL is a distance.
TO_DENSE = ("kl", *SHARES)
