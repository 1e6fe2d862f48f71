"""What becomes of a model when an SAE's reconstruction takes the place of its activations."""

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsg.errors import UserError
from dsg.lm import TokenBatch, read_activations, resolve_hook_point

if TYPE_CHECKING:
    from sae_lens import SAE

    from dsg.sae.features import Features


class SpliceSums:
    """Running sums over counted tokens, in float64; their size depends on the widths alone.

    Args:
        sae: An SAE of any architecture.
        features: Any features of it, as guards take them; None if guards refuse the SAE.

    Attributes:
        num_tokens: Counted tokens.
        num_predictions: Counted tokens right after a counted one.
        error: Sum of ||h - sae(h)||^2.
        variation: Sum of ||h - mean h||^2.
        mean: Mean of h, shape [d_in].
        norm: Sum of ||h||.
        scale: Sum of the residual units that a guard writes per unit of decoder output.
        num_fired: Tokens on which a feature's activation is not 0, shape [d_sae].
        acts: Sum of activations, shape [d_sae].
        losses: Sums of next-token cross-entropy over the predictions, in nats: plain, with sae(h)
            and with zeros in the place of h at counted tokens, shape [3].
    """

    def __init__(self, sae: "SAE[Any]", features: "Features | None") -> None:
        self._sae = sae
        self._features = features
        self.num_tokens = 0
        self.num_predictions = 0
        self.error = 0.0
        self.variation = 0.0
        self.mean = torch.zeros(sae.cfg.d_in, dtype=torch.float64)
        self.norm = 0.0
        self.scale = 0.0
        self.num_fired = torch.zeros(sae.cfg.d_sae, dtype=torch.int64)
        self.acts = torch.zeros(sae.cfg.d_sae, dtype=torch.float64)
        self.losses = torch.zeros(3, dtype=torch.float64)

    @torch.no_grad()
    def update(self, model: PreTrainedModel, hook_point: str, batch: TokenBatch) -> None:
        """Add a batch on the device of the model, which is in evaluation mode.

        Raises:
            UserError: The hook point never runs or is not as wide as the SAE, or activations,
                reconstructions or losses are not finite.
        """
        h = read_activations(model, hook_point, batch)  # [batch, seq, d_in]
        if h.shape[-1] != len(self.mean):
            raise UserError(
                f"`hook_point` {hook_point!r} must be {len(self.mean)} wide as the SAE is, got "
                f"{h.shape[-1]}; choose a decoder layer."
            )
        spliced, ablated = h.clone(), h.clone()
        ablated[batch.token_mask] = 0
        # One sequence at a time: that bounds the feature activations, and an SAE that looks at
        # context sees a sequence without padding.
        for row in range(len(h)):
            real, counted = batch.attention_mask[row] != 0, batch.token_mask[row]
            if counted.any():
                spliced[row, counted] = self._add_sequence(h[row, real], counted[real])
        self.num_predictions += int(_predicted(batch.token_mask).sum())
        for index, replacement in enumerate((None, spliced, ablated)):
            self.losses[index] += _loss_sum(model, hook_point, batch, replacement)

    def _add_sequence(
        self, h: Float[Tensor, "seq d_in"], counted: Bool[Tensor, " seq"]
    ) -> Float[Tensor, "counted d_in"]:
        """Adds a sequence and returns the reconstruction of its counted tokens."""
        _check_finite(h[counted], "activations at the hook point", "load the model in float32")
        sae = self._sae
        sae_in = h[None].to(sae.W_dec.device)  # [1, seq, d_in]
        acts = sae.encode(sae_in)  # [1, seq, d_sae]
        # A temporal SAE's `decode` leaves out what it predicts from context.
        is_temporal = sae.cfg.architecture() == "temporal"
        sae_out = sae(sae_in) if is_temporal else sae.decode(acts)
        if sae_out.shape != sae_in.shape:
            raise UserError(
                f"the SAE must reconstruct what it reads, {h.shape[-1]} wide, got "
                f"{sae_out.shape[-1]}; use an SAE rather than a transcoder."
            )
        acts = acts[0][counted.to(acts.device)]  # [counted, d_sae]
        sae_out = sae_out[0].to(h.device)[counted]  # [counted, d_in]
        _check_finite(sae_out, "the SAE's reconstructions", "check its weights")
        self._add_tokens(h[counted].double().cpu(), sae_out.double().cpu())
        scale = None if self._features is None else self._features.output_scale(h[counted])
        self.scale += len(sae_out) if scale is None else scale.double().sum().item()
        self.num_fired += (acts != 0).sum(0).cpu()
        self.acts += acts.double().sum(0).cpu()
        return sae_out.to(h.dtype)

    def _add_tokens(self, h: Tensor, sae_out: Tensor) -> None:
        self.error += (h - sae_out).square().sum().item()
        self.norm += h.norm(dim=1).sum().item()
        # Merged means, because a difference of large sums of squares would lose the variation
        # where the mean is far from 0.
        num, mean = len(h), h.mean(0)
        total, apart = self.num_tokens + num, mean - self.mean
        self.variation += (h - mean).square().sum().item()
        self.variation += (apart @ apart).item() * self.num_tokens * num / total
        self.mean += apart * (num / total)
        self.num_tokens = total


def _loss_sum(
    model: PreTrainedModel, hook_point: str, batch: TokenBatch, replacement: Tensor | None
) -> float:
    """Summed next-token loss in nats with `replacement` as the hook point's hidden states."""

    def splice(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if replacement is None:
            return output
        return (replacement, *output[1:]) if isinstance(output, tuple) else replacement

    handle = resolve_hook_point(model, hook_point).register_forward_hook(splice)
    try:
        logits = model(**batch.model_inputs(), use_cache=False).logits  # [batch, seq, vocab]
    finally:
        handle.remove()
    total = 0.0
    # Row by row, so that only one row's logits are ever copied to float32.
    for row, ids, keep in zip(logits, batch.input_ids, _predicted(batch.token_mask), strict=True):
        predictions = row[:-1][keep].float()  # [kept, vocab]
        losses = F.cross_entropy(predictions, ids[1:][keep], reduction="none")
        total += losses.double().sum().item()
    if not math.isfinite(total):
        raise UserError(
            "the model's next-token loss must be finite, got nan or inf with its activations at "
            f"{hook_point!r} {'as they are' if replacement is None else 'replaced'}; load the "
            "model in float32."
        )
    return total


def _predicted(token_mask: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq-1"]:
    """True for counted tokens, from the second on, that follow a counted one.

    What an uncounted token predicts is left out: its activations are never replaced.
    """
    return token_mask[:, 1:] & token_mask[:, :-1]


def _check_finite(values: Tensor, what: str, remedy: str) -> None:
    bad = int((~values.isfinite()).any(dim=-1).sum())
    if bad:
        raise UserError(
            f"{what} must be finite, got nan or inf on {bad} of {len(values)} tokens; {remedy}."
        )
