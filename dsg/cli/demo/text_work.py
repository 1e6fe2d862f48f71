"""What a worker does for the demonstration on the user's own text, beside Lightning runs."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from datamodules.parts.loading import passage_loader
from dsg.cli.configs import Config, combinations
from dsg.cli.demo.text import EXPERIMENT
from dsg.cli.grid.work import describe_strongest, instantiate, write_config
from dsg.errors import UserError
from dsg.evaluation import Passage, auroc, continuation_rouge, is_measurable, mean_rouge, score_all
from dsg.guard import Guard, GuardSettings
from dsg.io import row, write_results
from dsg.lm import load_model
from dsg.sae import load_sae
from lightning_modules.parts.guards import maker_from

_log = logging.getLogger(__name__)


def tune_guards(folder: Path, config: Config, configs: Path) -> dict[str, Any]:
    """Choose the features by the density AUROC on validation passages and save all guards.

    Args:
        folder: Gets a folder per guard.
        config: `config` of an evaluation of the guard, `grid` of its settings, number of random
            `draws`, and the `parts` whose passages decide.
        configs: Where the configuration is written.

    Returns:
        The chosen `settings` and the described `features`.
    """
    module, data = instantiate(write_config(configs / "dsg.yaml", config["config"]))
    settings: GuardSettings = module.guard_settings
    data.setup("validate")
    model, sae = load_model(module.model_name), load_sae(settings.sae, settings.sae_id)
    maker = maker_from(settings, model, sae, data)
    forget = maker.statistics(data.forget_texts())

    def make(settings: GuardSettings) -> Guard:
        own = copy.copy(maker)
        own.settings = settings
        return own.make(forget)

    passages = _validation_passages(data, config["parts"])
    loader = passage_loader(data.tokenizer, passages, data.batch_size, None, settings.max_length)
    batches = list(loader)
    plain = score_all(model, batches)
    tries = []
    for varied in combinations(config["grid"]):
        guarded = score_all(model, batches, make(replace(settings, **varied)))
        tries.append((varied, _validate(passages, plain, guarded)))
    chosen, validation = max(tries, key=lambda pair: pair[1]["density_auroc"])
    dsg = replace(settings, **chosen)
    guards = {"dsg": make(dsg), "static_clamp": make(replace(dsg, method="static_clamp"))}
    for draw in range(config["draws"]):
        try:
            guards[f"random_{draw}"] = make(replace(dsg, method="random", draw=draw))
        except UserError as error:  # a control that cannot be had must not cost the run
            _log.warning("There is no control: %s", error)
            break
    for name, guard in guards.items():
        guard.save(folder / name)
    features = describe_strongest(guards["dsg"], model, data, sae, data.forget_texts())
    choice = {"method": "dsg", "chosen": chosen, "tried": len(tries), "validation": validation}
    return {"settings": choice, "features": features}


def continue_passages(folder: Path, config: Config, configs: Path) -> dict[str, Any]:
    """ROUGE-L of verbatim continuation on test passages, without a guard and with each.

    Where the model does not continue memorised passages twice as well as unseen ones, no row is
    written: forgetting could not be told from never having known.

    Args:
        folder: Gets the result rows.
        config: `config` of an evaluation, and folders of the `guards` by method.
        configs: Where the configuration is written.

    Returns:
        Means without a guard, and whether rows could be written.
    """
    module, data = instantiate(write_config(configs / "base.yaml", config["config"]))
    model = load_model(module.model_name)
    data.setup("test")
    texts: dict[tuple[str, str], list[str]] = {}
    for part in ("memorised", "unseen"):
        data.part = part
        for passage in data.passages("test"):
            texts.setdefault((part, passage.domain), []).append(passage.text)

    def measure(guard: Guard | None = None) -> dict[tuple[str, str], torch.Tensor]:
        return {
            key: continuation_rouge(model, data.tokenizer, passages, guard)
            for key, passages in texts.items()
        }

    plain = measure()
    memorised, unseen = (
        torch.cat([values for (of_part, _), values in plain.items() if of_part == part])
        for part in ("memorised", "unseen")
    )
    facts = {
        "measurable": is_measurable(memorised, unseen),
        "memorised": memorised.mean().item(),
        "unseen": unseen.mean().item(),
    }
    if not facts["measurable"]:
        return facts
    values = {("base", "none"): plain}
    for method, path in config["guards"].items():
        values[method, "on"] = measure(Guard.load(path))
    write_results(
        folder,
        [
            row(
                experiment=EXPERIMENT,
                method=method,
                guard=state,
                seed=module.seed,
                model=module.model_label,
                dataset=f"text/{part}",
                domain=domain,
                split="test",
                protocol="continuation",
                metric="rouge_l",
                **vars(mean_rouge(scores)),
            )
            for (method, state), by_key in values.items()
            for (part, domain), scores in by_key.items()
        ],
    )
    return facts


def _validation_passages(data: Any, parts: Sequence[str]) -> list[Passage]:
    passages: list[Passage] = []
    for part in parts:
        data.part = part
        passages += data.passages("validation")
    return [replace(passage, id=id) for id, passage in enumerate(passages)]


def _validate(
    passages: Sequence[Passage], plain: dict[str, torch.Tensor], guarded: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Density AUROC, trigger rates, and what the guard adds to the loss, in nats per token."""
    scores: dict[str, float] = {}
    densities = {}
    for domain in ("forget", "retain"):
        rows = torch.tensor([passage.domain == domain for passage in passages])
        densities[domain] = guarded["density"][rows].tolist()
        scores[f"{domain}_trigger_rate"] = guarded["triggered"][rows].mean().item()
        added = (guarded["nll_sum"][rows] - plain["nll_sum"][rows]).sum()
        scores[f"{domain}_added_loss"] = (added / plain["num_tokens"][rows].sum()).item()
    return {"density_auroc": auroc(densities["forget"], densities["retain"]).value, **scores}
