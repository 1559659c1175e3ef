"""Two rungs for criteria of keys: attention that is lost, then KL to the dense model, text by text.

Cheap: in some layers, what share of the attention that comes behind a prompt goes to keys that went
away? Nothing runs but the choice itself. Dear: the model goes on with the keys that stayed. Each
text is an objective of its own, since criteria that are good at one need not be at the other.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from prunezero.errors import ScoreError, SelectionError, StatisticsError
from prunezero.models.attending.continuing import Continuations, continued
from prunezero.models.attending.installing import Known
from prunezero.models.attending.interface import remembering_layers
from prunezero.models.attending.observing import (
    Attended,
    attended_of,
    merged,
    next_attention,
    reread_attention,
    writers,
)
from prunezero.models.attending.policy import Policy
from prunezero.models.loading.language_model import LanguageModel
from prunezero.pruning.attention import policy_of
from prunezero.pruning.recipes.recipe import Recipe

Texts = Mapping[str, Continuations]
# What a criterion may meet on a text that makes it no candidate.
_FAULTS = (ScoreError, SelectionError, StatisticsError)


def column_policy(recipe: Recipe, kept: float) -> Policy:
    """What a recipe of keys does.

    Raises:
        RecipeError, SelectionError: as `policy_of`; links are no keys.
    """
    found = policy_of(recipe, kept)
    if not isinstance(found, Policy):
        raise SelectionError(
            f"recipe {recipe.name} leaves out links, and keys of a cache are looked for; use a "
            "recipe of unit: kv_column"
        )
    return found


def spread(count: int, wanted: int) -> list[int]:
    """So many places of `count`, the middles of equal parts; all of them where there are fewer."""
    wanted = min(wanted, count)
    return [(2 * part + 1) * count // (2 * wanted) for part in range(wanted)]


class Rungs:
    """What recipes of keys are worth on some prompts, cheaply and dearly."""

    def __init__(
        self, language_model: LanguageModel, texts: Texts, known: Known, *, layers: int
    ) -> None:
        """Prepare prompts that the dense model has read.

        Args:
            texts: by name, each an objective.
            known: how queries of calibration text are distributed (`query_moments`).
            layers: that the cheap rung looks at, spread over the depth.
        """
        self._model, self._texts, self._known = language_model, texts, known
        self._remembering = remembering_layers(language_model)
        self._layers = [
            self._remembering[place] for place in spread(len(self._remembering), layers)
        ]
        # What each sampled layer saw of each prompt, and the attention that its keys will receive.
        self._seen: dict[str, list[tuple[Attended, Tensor]]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the texts, in their order."""
        return tuple(self._texts)

    def prepare(self, features: Collection[str]) -> None:
        """Measure what formulas of these features look at, and the attention that comes."""
        by_writer = writers(self._model) if "VON" in features else {}
        for name, text in self._texts.items():
            self._seen[name] = []
            for reading in text.readings:
                coming = next_attention(self._model, reading.ids, text.prompt)
                known = self._known_of(reading.ids[: text.prompt], coming, features)
                for layer in self._layers:
                    attended = attended_of(
                        reading.calls[layer],
                        writer=by_writer.get(layer),
                        measured=known.get(layer),
                    )
                    received = coming[layer].next_attention
                    if received is not None:
                        self._seen[name].append((attended, received.double()))

    def screened(self, recipe: Recipe, kept: float) -> dict[str, Any]:
        """Share of the coming attention that is lost, by text, and a digest of the keys that stay.

        The attention of each head of each sampled layer to the prompt counts alike. A recipe that
        cannot choose here has a `fault` instead.
        """
        try:
            policy = column_policy(recipe, kept)
            digest = hashlib.sha256()
            lost = {name: self._lost(policy, name, digest) for name in self._texts}
        except _FAULTS as error:
            return {"fault": str(error)}
        return {"lost": lost, "mask": digest.hexdigest()[:32]}

    def measured(self, recipe: Recipe, kept: float) -> dict[str, Any]:
        """KL to the dense model in nats per token, by text; a `fault` where there is none."""
        try:
            policy = column_policy(recipe, kept)
            kl = {
                name: float(continued(self._model, policy, text, self._known).measures["kl"])
                for name, text in self._texts.items()
            }
        except _FAULTS as error:
            return {"fault": str(error)}
        if not all(map(math.isfinite, kl.values())):
            return {"fault": "its KL is not finite"}
        return {"kl": kl}

    def _known_of(self, prompt: Tensor, coming: Known, features: Collection[str]) -> Known:
        """What formulas of these features may look at beside a layer's own queries and keys."""
        found = merged(self._known, coming) if "ATT_NEXT" in features else self._known
        if "ATT_READ" in features:
            found = merged(found, reread_attention(self._model, prompt))
        return found

    def _lost(self, policy: Policy, name: str, digest: Any) -> float:
        """The mean over layers, prompts and heads of the share that goes to keys that went."""
        shares = []
        for attended, received in self._seen[name]:
            counts = policy.counts(attended.keys.shape[1], len(self._remembering))
            chosen = policy.chosen(attended, counts[self._remembering.index(attended.layer)])
            digest.update(chosen.cpu().numpy().tobytes())
            kept = (received * chosen.to(received.device)).sum(1) / received.sum(1)
            shares.append(float(1 - kept.mean()))
        return math.fsum(shares) / len(shares)
