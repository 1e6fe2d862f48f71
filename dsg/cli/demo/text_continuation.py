"""Verbatim continuation as a stage of the demonstration on the user's own text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsg.cli.demo.text_stages import EXPERIMENT, Part, TextCell
from dsg.evaluation import continuation_rouge, is_measurable, mean_rouge
from dsg.guard import Guard
from dsg.io import row, write_results
from dsg.lm import load_model


def continue_passages(
    cell: TextCell, methods: Sequence[str], guards: Path, folder: Path
) -> dict[str, Any]:
    """ROUGE-L of verbatim continuation on test passages, without a guard and with each.

    Where the model does not continue memorised passages twice as well as unseen ones, no row is
    written: forgetting could not be told from never having known.
    """
    model = load_model(cell.model)
    data = cell.data()
    data.setup("test")
    texts: dict[tuple[Part, str], list[str]] = {}
    for part in ("memorised", "unseen"):
        data.part = part
        for passage in data.passages("test"):
            texts.setdefault((part, passage.domain), []).append(passage.text)
    plain = {key: continuation_rouge(model, data.tokenizer, found) for key, found in texts.items()}
    memorised, unseen = (
        torch.cat([values for (of, _), values in plain.items() if of == part])
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
    for method in methods:
        guard = Guard.load(guards / method)
        values[method, "on"] = {
            key: continuation_rouge(model, data.tokenizer, found, guard)
            for key, found in texts.items()
        }
    rows = [
        row(
            experiment=EXPERIMENT,
            method=method,
            guard=state,
            seed=cell.seed,
            model=cell.model_label,
            dataset=f"text/{part}",
            domain=domain,
            split="test",
            protocol="continuation",
            metric="rouge_l",
            **vars(mean_rouge(found)),
        )
        for (method, state), by_key in values.items()
        for (part, domain), found in by_key.items()
    ]
    write_results(folder, rows)
    logged = {
        f"test/{one['domain']}/guard_{'on' if one['guard'] == 'on' else 'off'}/rouge_l"
        f"/{one['method']}/{one['dataset']}": one["value"]
        for one in rows
    }
    for logger in cell.tracking.loggers(folder, f"seed_{cell.seed}/text/continuation"):
        logger.log_metrics(logged)
        logger.save()
    return facts
