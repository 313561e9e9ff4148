"""The report's four forms, written side by side: one page of HTML, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from softprompt.errors import SaveError
from softprompt.report.pages import page
from softprompt.report.parts import Page, Table
from softprompt.report.paths import without_folders
from softprompt.report.read import ReportedRun, read_runs
from softprompt.store.atomic import replace_file
from softprompt.store.json_values import plain
from softprompt.store.ownership import claim, folder_named

NAME = "report"
FILES = tuple(f"{NAME}.{ending}" for ending in ("html", "md", "csv", "json"))


def write_reports(folders: Sequence[Path], out: str | Path) -> list[Path]:
    """Reads the runs in `folders` and write report.html, .md, .csv and .json into `out`; only reports of ours are replaced.

    Raises DataError, SaveError."""
    runs = read_runs(folders)
    pages = [page(run, number) for number, run in enumerate(runs, start=1)]
    contents = {
        "html": as_html(pages),
        "md": as_markdown(pages),
        "csv": as_csv(runs),
        "json": as_json(runs, pages),
    }
    out = folder_named(out)
    claim(out, NAME, FILES)
    written = []
    try:
        for ending, content in contents.items():
            path = out / f"{NAME}.{ending}"
            replace_file(path, content)
            written.append(path)
    except OSError as error:
        raise SaveError(
            f"{out}: the report cannot be written there ({error.strerror}). Choose --out."
        ) from error
    return written


def as_html(pages: Sequence[Page]) -> str:
    """One self-contained page: nothing is loaded from anywhere."""
    title = pages[0].title if len(pages) == 1 else f"{len(pages)} runs"
    return _template().render(title=f"softprompt: {title}", pages=pages)


def as_markdown(pages: Sequence[Page]) -> str:
    """The same without charts."""
    lines: list[str] = []
    for run_page in pages:
        lines += [f"# {_escaped(run_page.title)}", "", _escaped(run_page.facts), ""]
        if run_page.verdict:
            lines += [f"**{_escaped(run_page.verdict)}**", ""]
        for section in run_page.sections:
            if not (section.text or section.tables or section.points or section.blocks or section.samples):
                continue  # charts alone
            if not (section.tables or section.points or section.blocks or section.samples):
                continue
            lines += [f"## {section.title}", ""]
            for text in section.text:
                lines += [_escaped(text), ""]
            for table in section.tables:
                lines += _markdown_table(table)
            for sample in section.samples:
                lines += [f"- {_one_line(sample.input) or '(no input)'}"]
                if sample.wanted:
                    lines.append(f"  - wanted: {_one_line(sample.wanted)}")
                for arm, answer in sample.answers.items():
                    mark = f" ({mark})" if (mark := sample.mark(arm)) else ""
                    lines.append(f"  - {arm}: {_one_line(answer) or '(nothing)'}{mark}")
            if section.samples:
                lines.append("")
            lines += [f"- {_escaped(text)}" for text in section.points]
            if section.points:
                lines.append("")
            for block in section.blocks:
                fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
                lines += [*([f"{block.title}:", ""] if block.title else []), fence, block.text, fence, ""]
    return "\n".join(lines).rstrip() + "\n"


def as_csv(runs: Sequence[ReportedRun]) -> str:
    """A line for each arm of each run, figures in full precision; unknown ones are empty."""
    table: list[dict[str, Any]] = []
    for run in runs:
        for arm, summary in run.comparison.summary.arms.items() if run.comparison is not None else ():
            line: dict[str, Any] = {"run": run.title, "arm": arm, "seeds": summary.seeds}
            for name, figure in summary.metrics.items():
                line |= {name: figure.value, f"{name}_stderr": figure.stderr, "n": figure.n}
            for name in ("against_best", "against_base"):
                difference = getattr(summary, name)
                if difference is not None:
                    line |= {f"{name}_{key}": getattr(difference, key) for key in ("value", "low", "high")}
            costs = {
                key: value for key, value in vars(summary).items() if isinstance(value, int | float | str)
            }
            table.append(line | {key: value for key, value in costs.items() if key != "seeds"})
        if run.tuning is not None:
            table.append({"run": run.title, "arm": run.tuning.kind, **run.tuning.metrics})
    names = list(dict.fromkeys(name for line in table for name in line))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: "" if _unknown(value) else without_folders(value) for key, value in line.items()}
        for line in table
    )
    return out.getvalue()


def as_json(runs: Sequence[ReportedRun], pages: Sequence[Page]) -> str:
    """The records, the verdicts and the samples."""
    entries = [
        {
            "title": without_folders(run.title),
            "kind": run.kind,
            "verdict": page.verdict,
            "record": without_folders(_record(run)),
            "samples": [{**asdict(sample), "differ": sample.differ} for sample in run.samples],
        }
        for run, page in zip(runs, pages, strict=True)
    ]
    return json.dumps(plain(entries), indent=1, ensure_ascii=False) + "\n"


@cache
def _template() -> jinja2.Template:
    text = (Path(__file__).parent / "page.html.j2").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(text)


def _markdown_table(table: Table) -> list[str]:
    lines = [f"### {table.title}", ""] if table.title else []
    width = len(table.head)
    lines.append("| " + " | ".join(map(_cell, table.head)) + " |")
    lines.append("|" + "---|" * width)
    for row in table.rows:
        lines.append("| " + " | ".join(_cell(cell) for cell in [*row, *[""] * (width - len(row))]) + " |")
    return [*lines, "", *([_escaped(table.note), ""] if table.note else [])]


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str) -> str:
    return _escaped(" ".join(text.split()))


def _escaped(text: str) -> str:
    """Text that Markdown must not read as its own marks."""
    for mark in "\\`*_<[#":
        text = text.replace(mark, "\\" + mark)
    return text


def _unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _record(run: ReportedRun) -> dict[str, Any]:
    if run.comparison is not None:
        return run.comparison.to_record()
    return {"kind": "tuning", **(asdict(run.tuning) if run.tuning is not None else {})}
