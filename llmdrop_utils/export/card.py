"""What comes with each export: a model card, a record of what was measured, and the hub's own form of it."""

import datetime
import json
import math
from collections.abc import Mapping
from pathlib import Path

import yaml

from ..base.provenance import code_provenance
from ..dropping.plan import NAMES, DropPlan
from .measured import Measured, Task


def write_card(folder: Path, measured: Measured, this: str, parity: str) -> None:
    """Write README.md, results.json and .eval_results/ into the folder of an export.

    this: which of the exports it is. parity: how it was checked, as a sentence.
    """
    (folder / "README.md").write_text(_card(measured, this, parity), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(_record(measured), indent=2) + "\n", encoding="utf-8")
    for name, task in measured.tasks.items():
        path = folder / ".eval_results" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        value = 100 * task.dropped[task.metric]
        entry = {
            "dataset": {"id": task.data_set, "task_id": task.data_name or "default"},
            "value": round(value, 2),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "notes": f"{task.metric}, {task.n_shots}-shot, {task.n_documents} documents; lm-eval task {name}",
        }
        path.write_text(yaml.safe_dump([entry], sort_keys=False), encoding="utf-8")


def _record(measured: Measured) -> dict:
    """As lm-eval writes its results: per task the metrics and their standard errors; and what it has no place for."""
    return {
        "results": {name: _with_filter(task.dropped) for name, task in measured.tasks.items()},
        "results_of_dense_model": {name: _with_filter(task.dense) for name, task in measured.tasks.items()},
        "n-shot": {name: task.n_shots for name, task in measured.tasks.items()},
        "n-samples": {name: {"effective": task.n_documents} for name, task in measured.tasks.items()},
        "config": {"model": "llmdrop_utils", "model_args": {"base": measured.base, **measured.plan.key.to_json()}},
        "text": {
            corpus: {
                "retained_accuracy": [value if math.isfinite(value) else None for value in text.retained],
                "relative_perplexity": text.perplexity,
            }
            for corpus, text in measured.text.items()
        },
        "provenance": code_provenance(),
    }


def _with_filter(metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{name},none": value for name, value in metrics.items()}


def _card(measured: Measured, this: str, parity: str) -> str:
    plan, code = measured.plan, code_provenance()
    licence = (
        {"license": "apache-2.0"}
        if measured.licence == "Apache-2.0"
        else {"license": "other", "license_name": measured.licence}
    )
    front = licence | {"base_model": measured.base, "tags": ["llmdrop"]}
    dropped = {kind: ", ".join(map(str, getattr(plan, kind))) for kind in NAMES if getattr(plan, kind)}
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {measured.base} without {_what(plan)}\n",
        f"{this} Made from `{measured.base}` ({measured.identity}; licence: {measured.licence}) by\n",
        f"```sh\n{measured.command}\n```\n",
        "## What was dropped\n",
        *(f"- {NAMES[kind]} of layers {layers} (of {plan.n_layers}), most droppable first" for kind, layers in dropped.items()),
        "\nLayers were ranked by importance, 1 − cosine of the input and output of each, on "
        f"{measured.calibration}, as in *What Matters in Transformers? Not All Attention is Needed* (arXiv:2406.15786). "
        f"{parity}\n",
        *([f"{measured.mended}\n"] if measured.mended else []),
        "## Quality, beside the dense model\n",
        "| Text, held out | Next-token accuracy retained | Perplexity, relative |",
        "|---|---|---|",
        *(f"| {corpus} | {_percent(text.retained)} | {_times(text.perplexity)} |" for corpus, text in measured.text.items()),
        f"\n{measured.held_out} Brackets hold 95 % intervals.\n",
        "| Task | Metric | Dense | This model | Documents |",
        "|---|---|---|---|---|",
        *(_row(name, task) for name, task in measured.tasks.items()),
        "\n± is one standard error.\n",
        "## Size and speed\n",
        f"A token leaves {measured.kv_bytes[1]:,} bytes in a 16-bit key-value cache, instead of {measured.kv_bytes[0]:,}.\n",
        *(
            f"- {load}: {ratio:.2f} times as fast as the dense model, in torch (middle half of the repeats: ±{spread / 2:.0%})"
            for load, (ratio, spread) in measured.speed.items()
        ),
        f"\nMeasured on {(code['gpus'] or [code['processor']])[0]}; threads of the CPU: {code['cpu_threads']}.\n",
    ]
    return "\n".join(lines)


def _row(name: str, task: Task) -> str:
    scores = (f"{each[task.metric]:.1%} ± {each[f'{task.metric}_stderr']:.1%}" for each in (task.dense, task.dropped))
    return f"| {name} ({task.n_shots}-shot) | {task.metric} | {' | '.join(scores)} | {task.n_documents} |"


def _what(plan: DropPlan) -> str:
    parts = [
        f"{len(getattr(plan, kind))} {name} layer{'s' if len(getattr(plan, kind)) > 1 else ''}"
        for kind, name in NAMES.items()
        if getattr(plan, kind)
    ]
    return " and ".join(parts) or "any layer dropped"


def _percent(value: tuple[float, float, float]) -> str:
    middle, low, high = value
    if not all(map(math.isfinite, value)):
        return "not known: the dense model predicts too few tokens"
    return f"{middle:.1%} ({low:.1%} to {high:.1%})"


def _times(value: tuple[float, float, float]) -> str:
    middle, low, high = value
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
