"""Curves of the runs as inline SVG, whose colours are those of the page around it."""

import io
from collections.abc import Iterator, Sequence

from gpt2ft.report.schema import Report
from gpt2ft.report.table import measured

TITLES = {
    "eval/loss": "held-out loss, by each run's own objective",
    "train/loss": "training loss, by each run's own objective",
    "eval/accuracy": "held-out preference accuracy",
    "eval/reward_chosen": "held-out reward of chosen replies",
    "eval/reward_rejected": "held-out reward of rejected replies",
    "train/learning_rate": "learning rate",
    "train/grad_norm": "gradient norm",
    "train/tokens_per_second": "tokens/s",
}
INK = "#010101"  # stands for the page's own colour of text
COLOURS = [f"#0102{number:02x}" for number in range(8)]  # and these for the colours of its models
DASHES: Sequence[str | tuple[int, tuple[int, ...]]] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.formatter.useoffset": False}


def curves(report: Report) -> Iterator[tuple[str, str]]:
    """Yield title and SVG of each metric that a run has logged; the same report gives the same bytes.

    Raises:
        ImportError: if matplotlib is missing.
    """
    from matplotlib import rc_context

    for metric, title in TITLES.items():
        lines = [measured(model, ("training", "curves", metric)) for model in report["models"]]
        if any(lines):
            with rc_context(STYLE | {"svg.hashsalt": metric}):
                yield title, _svg(lines)


def _svg(lines: Sequence[Sequence[tuple[int, float]] | None]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 2.4), layout="constrained")
    axes = figure.add_subplot()
    for number, line in enumerate(lines):
        if line:
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
            axes.plot(*zip(*line, strict=True), **style, marker="o" if len(line) < 12 else "", markersize=3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step", color=INK)
    axes.tick_params(colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = written.getvalue()
    for number, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--model-{number})")
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
