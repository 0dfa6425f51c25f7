"""The figures of a benchmark: rates of each way, their ratio, and the share of what the machine can do.

    6N            = 6 x parameters x tokens: what multiplying by every parameter costs, forward and backward
    6N + attention = 6N + 12 x layers x width x pairs of a token and one that it sees

With adapters, frozen matrices take no gradient of their own: 4N for them and 6N for what is trained.
"""

from typing import Any

from gpt2ft.benchmark.training import Training
from gpt2ft.benchmark.work import Amounts
from gpt2ft.model.gpt2 import GPT2Config

RATES = ("path_tokens_per_second", "supervised_tokens_per_second", "pairs_per_second")


def rates(amounts: Amounts, seconds: float, peak_memory: int) -> dict[str, float]:
    """Return what one way computes in a second; a rate of nothing is left out."""
    computed = {
        "path_tokens_per_second": amounts.path_tokens,
        "supervised_tokens_per_second": amounts.supervised_tokens,
        "pairs_per_second": amounts.pairs,
    }
    found = {name: number / seconds for name, number in computed.items() if number}
    return found | {"seconds": seconds, "peak_memory_bytes": peak_memory}


def ratio(ours: dict[str, Any], usual: dict[str, Any]) -> dict[str, float]:
    """Return ours / usual of all that both have."""
    return {name: ours[name] / usual[name] for name in ours if name in usual and name != "seconds"}


def flops(training: Training, config: GPT2Config, amounts: Amounts) -> tuple[float, float]:
    """Return the floating-point operations of so much training by 6N, and by 6N + attention."""
    per_token = 4 * training.parameters + 2 * training.trained
    attention = 12 * config.n_layer * config.n_embd * amounts.visible
    if training.settings.what == "reference":  # no backward pass
        per_token, attention = 2 * training.parameters, attention / 3
    return per_token * amounts.tokens, per_token * amounts.tokens + attention


def lines(figures: dict[str, Any]) -> list[str]:
    """Return the figures for people, a line each."""
    ours, found = figures["ours"], []
    for name, value in ours.items():
        if name == "seconds_by_phase":
            whole = sum(value.values())
            found += [_row(phase, f"{1000 * spent:,.0f} ms, {spent / whole:.0%}") for phase, spent in value.items()]
        elif name != "seconds":
            found.append(_row(*_shown(name, value)))
    shared = [name for name in figures.get("usual", {}) if name in ours and name != "seconds"]
    for name in shared:
        shown, value = _shown(name, figures["usual"][name])
        found.append(_row(f"usual: {shown}", value))
    return found + [_row(f"ratio: {_shown(name, 0)[0]}", f"{figures['ratio'][name]:.2f} times") for name in shared]


def _shown(name: str, value: float) -> tuple[str, str]:
    """Return a figure's name and value for people."""
    if name.endswith("_per_second"):
        return name.removesuffix("_per_second") + "/s", f"{value:,.0f}" if value >= 10 else f"{value:.2f}"
    if name.endswith("_bytes"):
        return name.removesuffix("_bytes"), f"{value / 2**30:.2f} GiB"
    if name == "mfu" or name.startswith("share"):
        return name, f"{value:.1%}"
    if "flops" in name:
        return name, f"{value / 1e12:.3f} TFLOP/s"
    return name, f"{value:,}"


def _row(name: str, value: str) -> str:
    return f"{name.replace('_', ' '):<44}{value}"
