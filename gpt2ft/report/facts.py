"""What runs were trained on, and their curves: from what lies in their folders."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2ft.report.schema import Facts
from gpt2ft.settings.scripts import WITHOUT_EFFECT, RunSettings

MOST_POINTS = 500  # of a curve
NOT_COMPARED = dict.fromkeys(WITHOUT_EFFECT, True) | {"data": {"cache"}}


def facts(settings: RunSettings, manifest: Mapping[str, Any], metrics: Path) -> Facts:
    """Return the facts of a run from its recipe, its manifest and its metrics.jsonl."""
    plan = manifest["plan"]
    in_full = plan["streams"] * settings.training.tokens_per_micro_batch  # of a run whose manifest does not say it
    return {
        "sources": manifest["sources"],
        "dropped": manifest["dropped"],
        "supervised_share": plan["supervised"] / plan["tokens"],
        "repeated_share": plan["repeated"] / plan["tokens"],
        "fill": plan.get("fill", plan["tokens"] / in_full),
        "steps": manifest.get("finished", {}).get("step", plan["steps"]),  # which `patience` may have cut short
        "curves": curves(metrics.read_text(encoding="utf-8") if metrics.is_file() else ""),
    }


def curves(metrics: str) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) of each metric in the lines of a metrics.jsonl; of many points every k-th, and the last."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in metrics.splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # cut short: it is being written, or its run was killed
            continue
        for name, value in values.items():
            if "/" in name and isinstance(value, int | float):
                found.setdefault(name, []).append((values["step"], value))
    return {name: _thinned(points) for name, points in found.items()}


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    every = -(-len(points) // MOST_POINTS)
    return points[:-1][::every] + points[-1:]


def settings_that_differ(runs: Sequence[RunSettings | None]) -> dict[str, list[Any]]:
    """Return the settings by dotted name that at least two runs have and that are not the same in all of them."""
    flat = [_flat(run.model_dump(mode="json", exclude=NOT_COMPARED)) if run else {} for run in runs]
    names = dict.fromkeys(name for values in flat for name in values)
    values = {name: [each.get(name) for each in flat] for name in names}
    known = {name: [each[name] for each in flat if name in each] for name in names}
    return {name: values[name] for name in names if any(value != known[name][0] for value in known[name])}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
