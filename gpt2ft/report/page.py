"""A report as Markdown and as one page of HTML. Replies and names are hostile: whatever they hold is shown as text."""

from collections.abc import Iterator
from pathlib import Path

from gpt2ft.report import reference
from gpt2ft.report.curves import curves
from gpt2ft.report.schema import Reply, Report
from gpt2ft.report.table import Table, tables
from gpt2ft.text.markdown import fenced, inline, shown

CURVES_NEED = "The curves of the runs need matplotlib: pip install 'gpt2ft[report]'"
PAIRS = "What the start knows of the pairs"
LEGEND = (
    "Differences are from the first model. A star: chance alone does not explain it. Beside a figure stands what 95 of "
    "100 samples like this one give; after \N{GREEK CAPITAL LETTER DELTA}, the same for the difference."
)


def html(report: Report) -> str:
    """Return a page that needs no network, no script and no other file; the same report gives the same bytes."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    try:
        drawn = [(title, Markup(svg)) for title, svg in curves(report)]
        missing = ""
    except ImportError:
        drawn, missing = [], CURVES_NEED
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )  # fmt: skip
    page = environment.get_template("page.html")
    return page.render(
        report=report, tables=tables(report), curves=drawn, missing=missing, legend=LEGEND, note=note,
        pairs=_pairs_at_start(report), about_pairs=PAIRS, conditions=_conditions(report),
    )  # fmt: skip


def markdown(report: Report) -> str:
    """Return the report without its curves; replies stand in fenced blocks, which nothing in them can end."""
    return "\n".join(_lines(report))


def note(reply: Reply | None) -> str:
    """Return what must be said of a reply besides its words."""
    if reply is None:
        return "no reply: the model has failed"
    empty = "" if reply["text"].strip() else "empty"
    return ", ".join(filter(None, [empty, "" if reply["stopped"] else "cut off"]))


def _conditions(report: Report) -> list[tuple[str, str | int]]:
    """Return what the figures depend on besides the models."""
    keys = ("seed", "precision", "max_length", "left_out")
    facts = [(key, report[key]) for key in keys if key in report]
    return [*facts, *report.get("data", {}).items(), *report.get("versions", {}).items()]


def _pairs_at_start(report: Report) -> list[str]:
    return reference.lines(report["pairs_at_start"]) if "pairs_at_start" in report else []


def _lines(report: Report) -> Iterator[str]:
    names = [inline(model["name"]) for model in report["models"]]
    yield from (f"# {', '.join(names)}", "")
    yield from (f"- **{inline(warning)}**" for warning in report.get("warnings", ()))
    yield ""
    for number, conversation in enumerate(report.get("conversations", ()), start=1):
        yield from (f"## Conversation {number}", "")
        for turn in conversation["turns"]:
            yield from ("The user:", "", *fenced(turn["user"]))
            for name, reply in zip(names, turn["replies"], strict=True):
                remark = note(reply)
                yield from (f"{name}{f' ({remark})' if remark else ''}:", "")
                yield from fenced(reply["text"]) if reply and reply["text"].strip() else ()
    yield from (LEGEND, "")
    for table in tables(report):
        yield from _table(table)
    if pairs := _pairs_at_start(report):
        yield from (f"## {PAIRS}", "", *fenced("\n".join(pairs)))
    yield from ("## To get this again", "", *fenced("\n".join(report.get("commands", ()))))
    for model in report["models"]:
        digests = [f"{key} {model[key]}" for key in ("weights", "tokenizer") if key in model]
        yield f"- {inline(model['name'])}: {inline(', '.join([model['model'], *digests]))}"
    yield from (f"- {inline(f'{key}: {value}')}" for key, value in _conditions(report))
    yield ""


def _table(table: Table) -> Iterator[str]:
    yield from (f"## {inline(table.title)}", "", *([inline(table.note), ""] if table.note else ()))
    yield "| |" + "".join(f" {inline(name)} |" for name in table.columns)
    yield "|---|" + "---:|" * len(table.columns)
    for label, cells in table.rows:
        texts = [f"{c.value} {c.difference} {f'({c.interval})' if c.interval else ''}" if c else "" for c in cells]
        yield f"| {inline(label)} |" + "".join(f" {inline(text)} |" for text in texts)
    yield ""
