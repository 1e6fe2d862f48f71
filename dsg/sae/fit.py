"""Whether an SAE fits a model: what it loses, how sparse it is, how large a clamp would be."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from dsg.errors import UserError
from dsg.lm import TokenBatch, check_width, resolve_hook_point, unwrap
from dsg.sae.loading import slice_features
from dsg.sae.splicing import SpliceSums

if TYPE_CHECKING:
    from sae_lens import SAE

# What is usual: residual-stream SAEs of GPT-2 small (OpenAI's v5) and Gemma 2B (res-jb), in the
# evaluations published with them, leave 0.03 to 0.12 of the variance unexplained, add 0.01 to 0.1
# nats per token and recover 0.985 to 0.999 of the loss that zeros cost. The limits are wider:
# sparser SAEs and text of another kind cost more.
# The mean alone leaves 1 unexplained.
DOUBTFUL_FVU, UNFIT_FVU = 0.4, 0.7
# One nat is perplexity times e.
DOUBTFUL_LOSS_ADDED, UNFIT_LOSS_ADDED = 0.3, 1.0
# Zeros are worse than knowing nothing, which makes this lenient: an SAE of another model of the
# same shape may still recover 0.96. But it is the measure found in the literature.
DOUBTFUL_RECOVERED, UNFIT_RECOVERED = 0.95, 0.7
# Below so many nats per token the ablation, the yardstick of what splicing costs, is noise.
MIN_ABLATION_COST = 0.05
# Below one active feature per token most tokens are invisible to a guard.
UNFIT_L0 = 1.0
# Two features per coordinate, one for each sign, reproduce anything with L0 = d_in. What comes
# near that is a change of basis rather than sparse, and a density says nothing about it.
DOUBTFUL_L0_OF_WIDTH = 0.25
# A wide SAE needs much text before a silent feature can be called dead: the share is judged only
# where each feature would have fired this often, had all fired equally often.
DOUBTFUL_DEAD_SHARE, MIN_MEAN_FIRINGS = 0.5, 20.0
# A guard clamps some 20 features; nearly orthogonal, they move a token by 4.5 times what one does.
# Below 0.2 that is less than the token's own norm, and what it says remains. Above 100 a bfloat16
# model, with its 8 significant bits, rounds away all that the token said: noise, not forgetting.
MIN_CLAMP_RATIO, MAX_CLAMP_RATIO = 0.2, 100.0
# Fewer tokens are a few passages, and their topic decides every number.
MIN_TOKENS = 1000

# Features per slice: bounds the copies of encoder and decoder, 512 MiB for a width of 4096.
_FEATURES_AT_ONCE = 16384


@dataclass(frozen=True)
class Fit:
    """What was measured of an SAE at a model's hook point, over counted tokens only.

    Attributes:
        d_in: Width of the hook point.
        d_sae: Number of features.
        recorded_hook_point: Where the SAE says it reads; None if it does not say.
        hook_point_agrees: Whether that is the module that was given; None if it does not say.
        recorded_model: The model the SAE says it was trained on; None if it does not say.
        model_agrees: Whether that is the given name but for organisation and case; None if the
            SAE does not say, or the model is a local folder of another name.
        refusal: Why guards cannot use this SAE; None if they can.
        num_tokens: Counted tokens.
        num_predictions: Counted tokens right after a counted one; losses are means over these.
        fvu: Fraction of variance unexplained, at least 0; the mean alone leaves 1.
        l0: Mean number of active features (not 0) per token.
        num_dead: Features that were never active.
        loss: Next-token cross-entropy of the plain model, nats per token.
        loss_added: What the SAE's reconstruction in place of the activations adds to it.
        ablation_loss_added: What zeros in place of the activations add to it.
        mean_residual_norm: Mean L2 norm of the activations.
        clamp_value: The clamp meant by `clamp_ratio`, in units of SAE activations.
        clamp_ratio: Norm of what clamping one active feature writes, median over all that were
            ever active, in multiples of `mean_residual_norm`; None if guards cannot clamp any.
    """

    d_in: int
    d_sae: int
    recorded_hook_point: str | None
    hook_point_agrees: bool | None
    recorded_model: str | None
    model_agrees: bool | None
    refusal: str | None
    num_tokens: int
    num_predictions: int
    fvu: float
    l0: float
    num_dead: int
    loss: float
    loss_added: float
    ablation_loss_added: float
    mean_residual_norm: float
    clamp_value: float
    clamp_ratio: float | None

    @property
    def dead_share(self) -> float:
        """Share of features that were never active."""
        return self.num_dead / self.d_sae

    @property
    def loss_recovered(self) -> float | None:
        """1 if splicing costs nothing, 0 if as much as zeros do; None if those cost nothing."""
        if self.ablation_loss_added < MIN_ABLATION_COST:
            return None
        return 1 - self.loss_added / self.ablation_loss_added


@dataclass(frozen=True)
class Verdict:
    """Whether an SAE fits, with a sentence for each measure that is out of range."""

    outcome: Literal["fits", "doubtful", "does not fit"]
    reasons: tuple[str, ...]


def check_fit(
    model: nn.Module,
    sae: "SAE[Any]",
    hook_point: str,
    batches: Iterable[TokenBatch],
    *,
    clamp_value: float = -500.0,
    model_name: str | None = None,
) -> Fit:
    """Measure an SAE on the activations it is to read.

    Only counted tokens are reconstructed, or ablated by zeros as is usual in the literature.

    Args:
        model: The causal LM, possibly wrapped, in evaluation mode and without a guard.
        sae: An SAE of any architecture.
        hook_point: Where to read.
        batches: Text, padded on the right as `corpus_batches` does; gone through once.
        clamp_value: What a guard would write, in units of SAE activations.
        model_name: What the model is called; by default what it was loaded as.

    Raises:
        UserError: The widths differ, there is no such hook point, the model is training,
            activations, reconstructions or losses are not finite, or the text is too little.
    """
    check_width(model, sae.cfg.d_in)
    inner = unwrap(model)
    resolve_hook_point(inner, hook_point)
    if inner.training:
        raise UserError("`model` must be in evaluation mode, got a training one; call eval().")
    refusal, features = None, None
    try:
        features = slice_features(sae, [0])
    except UserError as error:
        refusal = str(error)
    sums = SpliceSums(sae, features)
    for batch in batches:
        sums.update(inner, hook_point, batch.to(inner.device))
    if sums.num_predictions == 0 or sums.variation == 0:
        raise UserError(
            "`batches` must hold different counted tokens that follow each other, got "
            f"{sums.num_tokens} counted; give more text."
        )
    recorded = sae.cfg.metadata
    plain, spliced, ablated = (sums.losses / sums.num_predictions).tolist()
    return Fit(
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        recorded_hook_point=recorded.hook_name,
        hook_point_agrees=_same_hook_point(inner, recorded.hook_name, hook_point),
        recorded_model=recorded.model_name,
        model_agrees=_same_model(recorded.model_name, model_name or inner.config.name_or_path),
        refusal=refusal,
        num_tokens=sums.num_tokens,
        num_predictions=sums.num_predictions,
        fvu=sums.error / sums.variation,
        l0=sums.num_fired.sum().item() / sums.num_tokens,
        num_dead=int((sums.num_fired == 0).sum()),
        loss=plain,
        loss_added=spliced - plain,
        ablation_loss_added=ablated - plain,
        mean_residual_norm=sums.norm / sums.num_tokens,
        clamp_value=clamp_value,
        clamp_ratio=None if refusal else _clamp_ratio(sae, sums, clamp_value),
    )


def verdict(fit: Fit) -> Verdict:
    """Judge a measurement by the thresholds of this module.

    Names of models do not count: an instruction-tuned model is called otherwise than the one its
    SAEs were trained on, and whether they fit it nevertheless is what the measures tell.
    """
    unfit, doubts = [*_failures(fit)], [*_doubts(fit)]
    outcome = "does not fit" if unfit else "doubtful" if doubts else "fits"
    return Verdict(outcome, (*unfit, *doubts))


def _failures(fit: Fit) -> Iterator[str]:
    recovered = fit.loss_recovered
    if fit.refusal is not None:
        yield f"Guards cannot use it: {fit.refusal}"
    if fit.fvu > UNFIT_FVU:
        yield f"{fit.fvu:.3g} of the variance is unexplained; more than {UNFIT_FVU:g} is no fit."
    if recovered is not None and recovered < UNFIT_RECOVERED:
        yield (
            f"Its reconstruction recovers {recovered:.3g} of the loss that zeros cost; less than "
            f"{UNFIT_RECOVERED:g} is no fit."
        )
    if fit.loss_added > UNFIT_LOSS_ADDED:
        yield (
            f"Its reconstruction adds {fit.loss_added:.3g} nats per token; more than "
            f"{UNFIT_LOSS_ADDED:g} is no fit."
        )
    if fit.l0 < UNFIT_L0:
        yield f"Only {fit.l0:.3g} features are active per token; a guard would miss most tokens."


def _doubts(fit: Fit) -> Iterator[str]:
    recovered = fit.loss_recovered
    if fit.hook_point_agrees is False:
        yield f"It says it reads {fit.recorded_hook_point}, which is another place."
    if fit.num_tokens < MIN_TOKENS:
        yield f"{fit.num_tokens} counted tokens are little text; give at least {MIN_TOKENS}."
    if DOUBTFUL_FVU < fit.fvu <= UNFIT_FVU:
        yield f"{fit.fvu:.3g} of the variance is unexplained; up to {DOUBTFUL_FVU:g} is usual."
    if DOUBTFUL_LOSS_ADDED < fit.loss_added <= UNFIT_LOSS_ADDED:
        yield (
            f"Its reconstruction adds {fit.loss_added:.3g} nats per token; up to "
            f"{DOUBTFUL_LOSS_ADDED:g} is usual."
        )
    if recovered is None:
        yield (
            f"Zeros in place of the activations add only {fit.ablation_loss_added:.3g} nats per "
            "token, so what splicing costs cannot be judged; give text the model can predict."
        )
    elif UNFIT_RECOVERED <= recovered < DOUBTFUL_RECOVERED:
        yield (
            f"Its reconstruction recovers {recovered:.3g} of the loss that zeros cost; at least "
            f"{DOUBTFUL_RECOVERED:g} is usual."
        )
    if fit.l0 > DOUBTFUL_L0_OF_WIDTH * fit.d_in:
        yield (
            f"{fit.l0:.3g} features are active per token, more than {DOUBTFUL_L0_OF_WIDTH:g} of "
            f"the width {fit.d_in}; that is not sparse, and a density would tell little."
        )
    firings = fit.l0 * fit.num_tokens / fit.d_sae
    if fit.dead_share > DOUBTFUL_DEAD_SHARE and firings >= MIN_MEAN_FIRINGS:
        yield (
            f"{fit.dead_share:.0%} of the features were never active, though there was text for "
            f"each to be active on {firings:.0f} tokens."
        )
    if fit.clamp_ratio is not None and not MIN_CLAMP_RATIO <= fit.clamp_ratio <= MAX_CLAMP_RATIO:
        effect = "hardly moves" if fit.clamp_ratio < MIN_CLAMP_RATIO else "wipes out"
        yield (
            f"Clamping a feature to {fit.clamp_value:g} writes {fit.clamp_ratio:.3g} times the "
            f"mean residual norm and {effect} the residual stream; choose a clamp value that "
            f"writes {MIN_CLAMP_RATIO:g} to {MAX_CLAMP_RATIO:g} times as much."
        )


def _clamp_ratio(sae: "SAE[Any]", sums: SpliceSums, clamp_value: float) -> float | None:
    fired = sums.num_fired.nonzero()[:, 0]
    if not len(fired):
        return None
    mean_active = sums.acts[fired] / sums.num_fired[fired]
    # Slices hold the rows that a guard adds, whatever the architecture makes of `W_dec`.
    norms = torch.cat(
        [
            slice_features(sae, ids.tolist()).W_dec.double().norm(dim=1).cpu()
            for ids in fired.split(_FEATURES_AT_ONCE)
        ]
    )
    written = (clamp_value - mean_active).abs() * norms
    return written.quantile(0.5).item() * sums.scale / sums.norm


def check_sae_place(model: nn.Module, sae: "SAE[Any]", hook_point: str) -> None:
    """Refuses an SAE that was trained on another place of the model, where it says so.

    Args:
        model: The language model, possibly wrapped.
        sae: An SAE of SAELens.
        hook_point: Where it is to read.

    Raises:
        UserError: If its recorded hook point is another one.
    """
    recorded = sae.cfg.metadata.hook_name
    if _same_hook_point(model, recorded, hook_point) is False:
        raise UserError(
            f"`hook_point` must be where the SAE was trained, {recorded!r}, got {hook_point!r}; "
            "use that hook point or another SAE."
        )


def _same_hook_point(model: nn.Module, recorded: Any, given: str) -> bool | None:
    if not isinstance(recorded, str) or not recorded:
        return None
    if recorded == given:
        return True
    try:
        return resolve_hook_point(model, recorded) is resolve_hook_point(model, given)
    except UserError:
        return False


def _same_model(recorded: str | None, given: str | None) -> bool | None:
    if not recorded or not given:
        return None
    if recorded.split("/")[-1].casefold() == given.rstrip("/").split("/")[-1].casefold():
        return True
    return None if Path(given).exists() else False
