"""Selects and calibrates a guard as a `validate` run: one pass over the texts, in little memory."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from dsg.errors import UserError
from dsg.guard import (
    FirstFiring,
    Gate,
    GuardSettings,
    SweepPoint,
    calibrate_guard,
    choose_features,
    draft_guard,
)
from dsg.guard.sweep import sweep
from dsg.io import row, write_atomically, write_results
from dsg.lm import check_width, load_model, read_activations, unwrap
from dsg.sae import (
    Features,
    check_finite,
    check_sae_place,
    check_supported,
    describe_sae,
    load_sae,
    slice_features,
)
from dsg.selection import FeatureStatistics, batch_statistics, describe_texts, guard_texts
from lightning_modules.parts.distributed import add_over_ranks, gather_firing_ranks
from lightning_modules.parts.precision import use_precision
from lightning_modules.parts.protocols import GUARD_DATA, SelectionBatch, data_of
from lightning_modules.parts.run import Run

if TYPE_CHECKING:
    from sae_lens import SAE

GUARD_FOLDER = "guard"
SWEEP_FILE = "sweep.csv"
SWEEP_COLUMNS = (
    "num_features",
    "threshold",
    "false_positive_rate",
    "low",
    "high",
    "n",
    "forget_trigger_rate",
)
# Purposes of the texts, in this order: features are selected from the first two and then looked for
# in the others.
SUMMED = ("forget_selection", "retain_selection")
COUNTED = ("retain_calibration", "retain_heldout", "forget_heldout")


class SelectionModule(Run):
    """Selects features, sets the threshold and measures the gate on held-out texts.

    Writes the guard to `<run directory>/guard`, and for every number of features up to the selected
    one threshold and rates to `sweep.csv`. The forward pass stops at the hook point. Sums are added
    step by step in the order of the batches, so any number of ranks gets the same bits, those of
    `dsg.build_guard`.

    Args:
        model_name: Hugging Face folder or hub name of the model.
        guard: Which guard to make.
        labels: Those of `Run`.

    Raises:
        UserError: `guard` names a saved guard, for which nothing is left to select.
    """

    kind = "selection"
    reads = "select"
    guard_settings: GuardSettings

    def __init__(self, model_name: str, guard: GuardSettings, **labels: Any) -> None:
        super().__init__(model_name, guard, method=guard.method, **labels)
        if guard.artifact is not None:
            raise UserError(
                f"`artifact` must be left out where a guard is to be selected, got "
                f"{guard.artifact!r}; remove it."
            )
        if guard.threshold is not None:
            raise UserError(
                f"`threshold` must be left out where it is to be measured, got {guard.threshold}; "
                "remove it."
            )
        self._held: tuple[SAE[Any], ...] = ()

    def configure_model(self) -> None:
        """Load the model and the SAE, once."""
        if self.model is not None:
            return
        use_precision(self.trainer)
        settings = self.guard_settings
        self.model = load_model(self.model_name)
        sae = load_sae(settings.sae, settings.sae_id, device=str(self._root_device))
        check_supported(sae)
        check_width(self.model, sae.cfg.d_in)
        check_sae_place(self.model, sae, settings.hook_point)
        # In a tuple it is no submodule, which a run in half precision would cast.
        self._held = (sae,)

    def on_validation_start(self) -> None:
        """Begin with empty sums."""
        d_sae = self.sae.cfg.d_sae
        self.features: Features | None = None
        self.sums = {purpose: FeatureStatistics(d_sae) for purpose in SUMMED}
        self.ranks: dict[str, FirstFiring] = {}

    def validation_step(
        self, batch: SelectionBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Sum up a batch, or look for the selected features in it."""
        del batch_idx, dataloader_idx
        if not isinstance(batch, dict) or batch.get("purpose") not in SUMMED + COUNTED:
            raise UserError(
                f"`data` must yield texts for {', '.join(SUMMED + COUNTED)}, got "
                f"{type(batch).__name__}; choose a data module that does."
            )
        if batch["purpose"] in SUMMED:
            self._sum(batch)
        else:
            self._count(batch)

    def on_validation_epoch_end(self) -> None:
        """Make the guard; write it, the results and the sweep."""
        self._select_once()
        firing = {
            purpose: gather_firing_ranks(ranks, self._root_device)
            for purpose, ranks in self.ranks.items()
        }
        draft = draft_guard(
            self.guard_settings,
            unwrap(self.model),
            data_of(self.trainer, "tokenizer").tokenizer,
            self.sae,
            self.selection,
            self.sums["retain_selection"],
            self.calibration.mean_residual_norm(),
        )

        def measure(gate: Gate, part: str) -> Float[Tensor, " n"]:
            return firing[part].statistics(gate)

        guard = calibrate_guard(draft, self.guard_settings, measure)
        texts = guard_texts(
            data_of(self.trainer, *GUARD_DATA), near=self.guard_settings.method == "dsg_near"
        )
        origin = {
            "sae": describe_sae(self.sae),
            "texts": {purpose: describe_texts(part) for purpose, part in texts.items()},
        }
        guard = guard.replace(facts={**guard.facts, **origin})
        points = sweep(
            firing["retain_calibration"],
            firing["retain_heldout"],
            firing["forget_heldout"],
            self.guard_settings.threshold_percentile,
            guard.gate,
        )
        rows = self._rows(points[-1], len(firing["retain_calibration"].densities()))
        logged = {
            f"val/{row['domain']}/guard_on/{row['metric']}": row["value"]
            for row in rows
            if row["value"] is not None
        }
        # Equal on all ranks; Lightning prints them as a table.
        self.log_dict(logged, sync_dist=True)
        if self.trainer.is_global_zero:
            guard.save(self.run_dir / GUARD_FOLDER)
            write_results(self.run_dir, rows)
            write_atomically(self.run_dir / SWEEP_FILE, sweep_table(points))

    @property
    def sae(self) -> "SAE[Any]":
        """The SAE, present once the model is configured."""
        return self._held[0]

    @property
    def _root_device(self) -> torch.device:
        return self.trainer.strategy.root_device

    def _sum(self, batch: SelectionBatch) -> None:
        part, hook_point = None, self.guard_settings.hook_point
        if batch["tokens"] is not None:
            part = batch_statistics(self.model, self.sae, hook_point, batch["tokens"])
        add_over_ranks(self.sums[batch["purpose"]], part, self._root_device)

    def _select_once(self) -> Features:
        if self.features is None:
            sums = [self.sums[purpose] for purpose in SUMMED]
            self.selection = choose_features(self.guard_settings, *sums)
            feature_ids = self.selection.feature_ids
            self.features = slice_features(self.sae, feature_ids)
            self.ranks = {purpose: FirstFiring(len(feature_ids)) for purpose in COUNTED}
            self.calibration = FeatureStatistics(len(feature_ids))
        return self.features

    def _count(self, batch: SelectionBatch) -> None:
        features = self._select_once()
        tokens, part, hook_point = batch["tokens"], None, self.guard_settings.hook_point
        if tokens is not None:
            h = read_activations(self.model, hook_point, tokens)
            counted = tokens.token_mask.to(h.device)
            check_finite(h, counted, hook_point)
            feature_acts = features.encode(h)
            self.ranks[batch["purpose"]].update(batch["ids"], feature_acts > 0, counted)
            part = FeatureStatistics(features.num_features)
            part.update(feature_acts, counted, residual=h)
        if batch["purpose"] == "retain_calibration":
            add_over_ranks(self.calibration, part, self._root_device)

    def _rows(self, point: SweepPoint, num_calibration: int) -> list[dict[str, Any]]:
        measured: list[tuple[str, str, str, dict[str, Any]]] = [
            (
                "retain",
                "calibration",
                "threshold",
                {"value": point.threshold, "n": num_calibration},
            ),
            ("retain", "heldout", "false_positive_rate", asdict(point.false_positive_rate)),
            ("forget", "heldout", "forget_trigger_rate", asdict(point.forget_trigger_rate)),
        ]
        return [
            row(**self.labels(), guard="on", domain=domain, split=split, metric=metric, **values)
            for domain, split, metric, values in measured
        ]


def sweep_table(points: Sequence[SweepPoint]) -> str:
    """A sweep as CSV with the columns `SWEEP_COLUMNS`; a rate without texts is left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(SWEEP_COLUMNS)
    for point in points:
        rate, forget = point.false_positive_rate, point.forget_trigger_rate
        writer.writerow(
            [
                point.num_features,
                point.threshold,
                rate.value if rate.n else "",
                rate.low,
                rate.high,
                rate.n,
                forget.value if forget.n else "",
            ]
        )
    return text.getvalue()
