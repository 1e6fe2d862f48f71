"""Whether what a guarded model writes is still language.

Two failures look alike in ROUGE but not to a reader. A model that repeats itself is told by the
share of repeated runs of four tokens (`repeated_share`). A model that writes word
salad is told by the model itself: how surprising is the text to the same model without its guard?

Text is *gibberish* if its mean loss under the unguarded model lies more than log 10 above what 99 %
of the unguarded model's own generations stay below, which means that its perplexity is ten times
as high. Greedy generations are the least surprising text there is, so that merely being less
surprising than 99 % of them would be too much to ask: a refusal or ordinary human prose is not.
The factor keeps those, and the unguarded model itself has a rate of 1 % at most.
"""

import math
from collections.abc import Sequence

import numpy as np

from dsg.errors import UserError
from dsg.selection import Proportion, wilson

OWN_PERCENTILE = 99.0
PERPLEXITY_FACTOR = 10.0


def gibberish_threshold(own_nll: Sequence[float]) -> float:
    """The mean loss above which text is gibberish to a model, in nats per token.

    Args:
        own_nll: Mean losses, under the unguarded model, of what it generates itself; NaN where it
            generated nothing.

    Raises:
        UserError: There is no generation to compare with.
    """
    known = np.asarray(own_nll, np.float64)
    known = known[~np.isnan(known)]
    if known.size == 0:
        raise UserError(
            "`own_nll` must hold the loss of at least one unguarded generation, got none; generate "
            "without the guard as well."
        )
    return float(np.percentile(known, OWN_PERCENTILE)) + math.log(PERPLEXITY_FACTOR)


def gibberish_rate(nll: Sequence[float], own_nll: Sequence[float]) -> Proportion:
    """Share of generations that are gibberish, with its Wilson interval.

    Args:
        nll: Mean loss of each generation under the unguarded model, in nats per token. Empty
            generations (NaN) are neither and do not enter `n`.
        own_nll: The same of the unguarded model's own generations to the same prompts.

    Raises:
        UserError: As for `gibberish_threshold`.
    """
    threshold = gibberish_threshold(own_nll)
    losses = np.asarray(nll, np.float64)
    said = losses[~np.isnan(losses)]
    return wilson(int((said > threshold).sum()), said.size)
