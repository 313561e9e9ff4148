"""Before and after on a real base: the README's table and picture, from one comparison.

    make base    # fetches SmolLM2-135M-Instruct into bases/smollm2
    softprompt compare --base bases/smollm2 --data builtin:messages --target label \
        --template $'Message: {text}\\nKind:{soft:10} {label}' --steps 50 --batch-size 8 --judge-rows 60 --validation 16 \
        --seeds 1 --arms base,wording,prompt,few-shot,soft,deep,lora --shots 6 --out runs/readme \
        --text $'Sort the message into one kind: delivery, payment, return, account, thanks or job.\\n'
    python benchmarks/before_and_after.py runs/readme/report.json   # keeps its figures in before_and_after.json
    python benchmarks/before_and_after.py                           # draws docs/pictures/before-after.svg, prints the table
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

HERE = Path(__file__).resolve().parent
FIGURES = HERE / "before_and_after.json"
PICTURE = HERE.parent / "docs" / "pictures" / "before-after.svg"
NAMES = {
    "wording": "the model, its best wording",
    "prompt": "a written instruction",
    "few-shot": "6 examples in front",
    "soft": "soft prompt",
    "deep": "deep prompt",
    "lora": "LoRA",
}
KEPT = (
    "stored_bytes",
    "added_tokens",
    "trained_parameters",
    "learning_cpu_seconds",
    "general_before",
    "general_on",
)


def main() -> None:
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]))
    figures = json.loads(FIGURES.read_text("utf-8"))
    PICTURE.write_text(picture(figures["arms"]), "utf-8")
    print(table(figures["arms"]))


def keep(report: Path) -> None:
    """Write what the table needs of a comparison's report, with what it was measured on."""
    (comparison,) = json.loads(report.read_text("utf-8"))
    record = comparison["record"]
    found = record["summary"]["arms"]
    arms = {
        name: {"accuracy": found[name]["metrics"]["accuracy"]} | {key: found[name].get(key) for key in KEPT}
        for name in NAMES
    }
    about = {
        key: record[key] for key in ("command", "made", "base", "data", "machine", "versions", "settings")
    }
    FIGURES.write_text(
        json.dumps({**about, "verdict": comparison["verdict"], "arms": arms}, indent=1) + "\n", "utf-8"
    )


def size(count: float) -> str:
    """Bytes as people write them."""
    for unit, scale in (("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}" if count < 100 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} bytes"


def table(arms: dict[str, Any]) -> str:
    """The README's table, in Markdown."""
    lines = [
        "| | accuracy | size per task | tokens added to a request | CPU seconds to train |",
        "|---|---|---|---|---|",
    ]
    for name, title in NAMES.items():
        arm = arms[name]
        right = arm["accuracy"]
        trained = f"{arm['learning_cpu_seconds']:.0f}" if arm["trained_parameters"] else "—"
        stored = size(arm["stored_bytes"]) if arm["stored_bytes"] else "—"
        added = max(0, round(arm["added_tokens"]))
        lines.append(
            f"| {title} | {right['value']:.2f} ± {right['stderr']:.2f} | {stored} | {added} | {trained} |"
        )
    return "\n".join(lines)


def picture(arms: dict[str, Any]) -> str:
    """A bar an arm, as SVG: accuracy, and the bytes that a task takes."""
    rows = []
    for row, (name, title) in enumerate(NAMES.items()):
        arm, top = arms[name], 52 + 40 * row
        value = arm["accuracy"]["value"]
        colour = {"soft": "#d9730d", "deep": "#d9730d", "lora": "#52779c"}.get(name, "#9aa5b1")
        stored = size(arm["stored_bytes"]) if arm["stored_bytes"] else "nothing to keep"
        rows.append(
            f'<text x="270" y="{top + 19}" text-anchor="end">{escape(title)}</text>'
            f'<rect x="282" y="{top}" width="{max(2, 300 * value):.0f}" height="28" rx="3" fill="{colour}"/>'
            f'<text x="{292 + 300 * value:.0f}" y="{top + 19}"><tspan font-weight="600">{value:.0%}</tspan>'
            f'<tspan fill="#52606d">  {stored}</tspan></text>'
        )
    height = 64 + 40 * len(rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="15" fill="#1f2933">'
        "<title>Right answers of SmolLM2-135M-Instruct on customer messages, by method</title>"
        f'<rect width="760" height="{height}" rx="8" fill="#ffffff"/>'
        '<text x="24" y="30" font-weight="600">Right answers, SmolLM2-135M-Instruct, six kinds of customer messages</text>'
        + "".join(rows)
        + "</svg>\n"
    )


if __name__ == "__main__":
    main()
