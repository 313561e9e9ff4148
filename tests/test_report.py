"""The report says what the records say, loads nothing, and is looked at in a real browser where there is one."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from math import nan
from pathlib import Path
from typing import Any

import pytest

from softprompt.cli.app import main
from softprompt.comparison.records import ArmResult, Comparison, Figure
from softprompt.comparison.settings import CompareSettings
from softprompt.comparison.summary import summarise
from softprompt.errors import DataError
from softprompt.evaluation.interval import Difference
from softprompt.evaluation.rows import Row
from softprompt.report import charts, figures
from softprompt.report.limits import limits
from softprompt.report.pages import page
from softprompt.report.parts import Page, Section
from softprompt.report.paths import without_folders
from softprompt.report.read import ReportedRun, Sample, read_runs
from softprompt.report.render import as_csv, as_html, as_markdown, write_reports
from softprompt.report.verdict import picks, verdict

NASTY = '<script>alert("x")</script> & | `code` ünï 😀'
RIGHT = {"base": 2, "few-shot": 8, "soft": 30, "lora": 31, "full": 32}


def judged(right: int, rows: int = 40) -> list[Row]:
    return [
        Row(
            i,
            i,
            f"Message {i}: {NASTY if i == 0 else 'text'} Kind: ",
            "ab"[i % 2],
            "ab"[i % 2] if i < right else "c",
            nll=1.0,
            tokens=2,
            text_bytes=3,
        )
        for i in range(rows)
    ]


def run_record(arm: str, seed: int) -> dict[str, Any]:
    """What one arm's process leaves, with figures as a small machine gives them."""
    learned = arm in ("soft", "lora", "full")
    size = {
        "base": 0,
        "few-shot": 300,
        "context": 4_000,
        "soft": 20_600,
        "lora": 800_000,
        "full": 13_700_000,
    }[arm]
    return {
        "arm": arm,
        "seed": seed,
        "confusion": {"labels": ["a", "b"], "table": [[3, 0], [1, 2]], "other": [0, 4]},
        "trained_parameters": size // 4 if learned else 0,
        "stored_bytes": size,
        "added_tokens": {"few-shot": 90.5, "soft": 20}.get(arm, 0),
        "decode_tokens_per_second": 300.0,
        "learning": {
            "seconds": 30.0 if learned else 0.1,
            "cpu_seconds": 29.0,
            "steps": 60 * learned,
            "best_step": 60 * learned,
            "rate": 0.01 if learned else None,
        },
        "judging": {"seconds": 3.0, "cpu_seconds": 2.0},
        "memory": {"loaded": 460_000_000, "peak_learning": 640_000_000, "peak_judging": 500_000_000},
        "base_unchanged": arm != "full",
        "general": {"before": 4.5, "on": 4.6, "off": 4.7 if arm == "full" else 4.5},
        "curve": [{"step": i + 1, "nll": 5 / (i + 1)} for i in range(60)] if learned else [],
        "validation": [{"step": s, "nll": 5 / (s + 1)} for s in (0, 30, 60)] if learned else [],
        "anatomy": {
            "kind": "soft",
            "length": 3,
            "table_norm_median": 1.2,
            "table_norm_range": [0.9, 1.6],
            "vectors": [{"norm": 2.0, "nearest": [{"token": NASTY, "cosine": 0.5}]} for _ in range(3)],
        }
        if arm == "soft"
        else None,
        "dtype": "bfloat16",
    }


def comparison(folder: Path, right: dict[str, int] = RIGHT, seeds: int = 2, **changes: Any) -> Comparison:
    """A comparison on disk, its figures computed from rows by the package itself."""
    rows = {
        arm: [judged(count - seed) for seed in range(1 if arm == "base" else seeds)]
        for arm, count in right.items()
    }
    runs = {arm: [run_record(arm, seed) for seed in range(len(rows[arm]))] for arm in rows}
    for arm, by_seed in rows.items():
        for seed, one in enumerate(by_seed):
            here = folder / "arms" / f"{arm}-{seed}"
            here.mkdir(parents=True)
            (here / "rows.jsonl").write_text("".join(row.to_json() + "\n" for row in one), encoding="utf-8")
    record = {
        "kind": "comparison",
        "made": "2026-01-02T03:04:05Z",
        "command": f"softprompt compare my.yaml --text '{NASTY}'",
        "settings": {
            "seeds": seeds,
            "answers": "generate",
            "shots": 4,
            "arms": ["base", "prompt", "soft"],
            "text": NASTY,
            "seconds": None,
        },
        "recipe": {"base": "builtin", "data": {"source": NASTY}},
        "template": "{soft:3}Message: {text} Kind: {label}",
        "target": "label",
        "base": {
            "name": "builtin",
            "revision": None,
            "sha256": "f" * 64,
            "parameters": 6_836_736,
            "dtype": "bfloat16",
        },
        "data": {
            "source": "builtin:messages",
            "revision": "sha256:1",
            "judged_on": "test",
            "rows": {"train": 480, "validation": 90, "judged": 40},
        },
        "versions": {"python": "3.11"},
        "machine": {
            "processor": "a CPU",
            "cores": 2,
            "threads": 1,
            "device": "cpu",
            "system": "Linux",
            "load": 0.5,
        },
        "own_process": True,
        "metrics": ["accuracy", "nll"],
        "arm_names": {arm: f"the arm {arm}" for arm in right},
        "health": {
            "notes": [],
            "splits": {
                "train": {
                    "rows": 480,
                    "duplicates": 1,
                    "lengths": {"shortest": 9, "median": 20, "p95": 31, "longest": 40},
                    "truncated": 0,
                    "dropped": 0,
                    "answers": 2,
                    "labels": {"a": 240, NASTY: 240},
                }
            },
            "judged_also_trained": 1,
            "judged_also_validated": 0,
            "validation_also_trained": 0,
            "contradictions": 0,
            "labels_never_trained": [],
        },
        "summary": asdict(
            summarise(
                {arm: [ArmResult.from_record(run) for run in seeds] for arm, seeds in runs.items()},
                rows,
                ["accuracy", "nll"],
            )
        ),
        "runs": runs,
        "failed": {"deep": "it did not fit into memory"},
    }
    made = Comparison.from_record({**record, **changes})
    (folder / "comparison.json").write_text(json.dumps(made.to_record()), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    folder = tmp_path_factory.mktemp("report")
    record = comparison(folder)
    write_reports([folder], folder)
    return record, folder


class Seen(html.parser.HTMLParser):
    """Tags that are open, ids, links, and everything that a browser would fetch."""

    VOID = frozenset({"meta", "input", "br", "img", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name == "href":
                self.links.append(str(value))
            if name in ("src", "srcset", "data", "action") or tag == "link":
                self.fetched.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_loads_nothing_and_takes_no_text_for_markup(
    compared: tuple[Comparison, Path],
) -> None:
    text = (compared[1] / "report.html").read_text("utf-8")
    seen = Seen()
    seen.feed(text)
    assert seen.open == []
    assert seen.scripts == 0
    assert seen.fetched == []
    assert len(set(seen.ids)) == len(seen.ids)
    assert all(link.removeprefix("#") in seen.ids for link in seen.links)
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert len(text.encode()) < 200_000


def test_every_colour_has_a_light_and_a_dark_value(compared: tuple[Comparison, Path]) -> None:
    text = (compared[1] / "report.html").read_text("utf-8")
    light, dark = (
        set(re.findall(r"(--[\w-]+): #", part))
        for part in re.findall(r":root \{(.*?)\}", text, re.DOTALL)[:2]
    )
    assert light == dark


def test_the_forms_tell_the_same_figures(compared: tuple[Comparison, Path]) -> None:
    record, folder = compared
    soft = record.summary.arms["soft"].metrics["accuracy"]
    assert soft.value == pytest.approx((30 + 29) / 80)
    told = figures.estimate(soft)
    assert told in (folder / "report.html").read_text("utf-8")
    assert told in (folder / "report.md").read_text("utf-8")
    lines = list(csv.DictReader(io.StringIO((folder / "report.csv").read_text("utf-8"))))
    (line,) = [one for one in lines if one["arm"] == "soft"]
    assert float(line["accuracy"]) == pytest.approx(soft.value)
    assert float(line["stored_bytes"]) == 20_600
    (whole,) = json.loads((folder / "report.json").read_text("utf-8"))
    assert whole["verdict"] == verdict(record)
    assert whole["record"]["summary"]["arms"]["soft"]["metrics"]["accuracy"]["value"] == pytest.approx(
        soft.value
    )


def test_the_page_has_every_section(compared: tuple[Comparison, Path]) -> None:
    (run,) = read_runs([compared[1]])
    found = [one.id for one in page(run, 1).sections]
    assert found == [
        "quality",
        "costs",
        "tradeoff",
        "curves",
        "samples",
        "confusion",
        "health",
        "anatomy",
        "reproduce",
        "limits",
    ]
    text = (compared[1] / "report.html").read_text("utf-8")
    assert "Only where they differ" in text
    assert "it did not fit into memory" in text


def test_the_verdict_follows_from_the_numbers(tmp_path: Path) -> None:
    clear = comparison(tmp_path / "clear", {"base": 2, "soft": 39}, seeds=1)
    assert verdict(clear) == (
        "The best accuracy, 0.975 ± 0.025 (n=40), comes from the soft prompt, significantly better than the base as it "
        "is. It takes 20.6 KB a task and 20 more tokens a request."
    )
    close = comparison(tmp_path / "close", {"base": 2, "soft": 38, "full": 39}, seeds=1)
    # One row of 40 differs: 0.025 with a standard error of 0.025 and Student's t of 39 degrees, 2.0227: reach 0.0506.
    # Significant once the reach is 0.025, so at 40 * (0.0506 / 0.025)^2 = 164 rows.
    assert verdict(close) == (
        "The best accuracy, 0.975 ± 0.025 (n=40), comes from full fine-tuning, significantly better than the base as it "
        "is. It takes 13.7 MB a task; the best of the smaller, the soft prompt, 0.950 ± 0.035, takes 20.6 KB a task and "
        "20 more tokens a request. No significant difference from the soft prompt, which may still be more than 0.02 "
        "worse: about 120 more rows would settle it."
    )
    equal = comparison(tmp_path / "equal", {"base": 20, "soft": 20}, seeds=1)
    assert verdict(equal) == "By accuracy no arm differs from another: all of them have 0.500 ± 0.080 (n=40)."
    alone = comparison(tmp_path / "alone", {"soft": 20}, seeds=1)
    assert "nothing to compare it with" in verdict(alone)


def with_difference(tmp_path: Path, within: float, **differences: Difference) -> Comparison:
    """A comparison whose arms differ from the best, full, as given."""
    made = comparison(tmp_path, {"base": 2, "soft": 33, "lora": 36, "full": 38}, seeds=1)
    arms = {
        name: replace(arm, against_best=differences.get(name, arm.against_best))
        for name, arm in made.summary.arms.items()
    }
    settings = CompareSettings(within=within)
    return replace(made, summary=replace(made.summary, arms=arms), settings=settings)


def test_a_noisier_arm_is_not_recommended_for_its_noise(tmp_path: Path) -> None:
    """The published report took 0.833 for level with 0.958, since its interval was wide, and left 0.925 behind."""
    made = with_difference(
        tmp_path,
        0.02,
        soft=Difference(-0.125, -0.26, 0.01, 40),  # the cheapest, and noisy
        lora=Difference(-0.033, -0.06, -0.006, 40),  # nearer, and surely behind
    )
    text = verdict(made)
    assert "significantly better than the base as it is and LoRA." in text
    assert "Within" not in text
    # 40 rows * (0.135 / 0.125)^2 = 47: seven more.
    assert "No significant difference from the soft prompt, which may still be more than 0.02 worse" in text
    assert "about 7 more rows would settle it" in text


def test_arms_that_are_known_to_be_level_are_ranked_by_what_they_cost(tmp_path: Path) -> None:
    level = {"soft": Difference(-0.001, -0.018, 0.016, 4000), "lora": Difference(0.0, -0.01, 0.01, 4000)}
    text = verdict(with_difference(tmp_path, 0.02, **level))
    assert "Within 0.02 of it, the soft prompt costs the least to keep" in text
    assert "No significant difference" not in text
    narrow = verdict(with_difference(tmp_path / "narrow", 0.005, **level))
    assert "Within" not in narrow
    assert "more rows would settle it" in narrow


def test_the_limits_follow_from_how_it_was_made(compared: tuple[Comparison, Path], tmp_path: Path) -> None:
    told = " ".join(limits(compared[0]))
    assert "40 rows were judged on" in told
    assert "One seed" not in told
    assert "Still improving at the last step: soft, lora, full" in told
    assert "6,836,736 weights" in told
    assert "was busy" not in told
    busy = {"processor": "a CPU", "cores": 2, "load": 9.0}
    one = comparison(tmp_path, {"base": 40, "soft": 30}, seeds=1, machine=busy)
    told = " ".join(limits(one))
    assert "One seed" in told
    assert "was busy (load 9.0 on 2 cores)" in told
    assert "standard error of 0" in told


def test_evaluations_on_the_same_rows_stand_side_by_side(tmp_path: Path) -> None:
    for name, right in (("base", 2), ("mine", 38)):
        here = tmp_path / name
        here.mkdir()
        (here / "rows.jsonl").write_text(
            "".join(row.to_json() + "\n" for row in judged(right)), encoding="utf-8"
        )
        record = {
            "complete": True,
            "rows": 40,
            "metrics": {"accuracy": {}},
            "confusion": None,
            "about": {
                "name": name,
                "base": {"name": "builtin"},
                "data": {"source": "x", "split": "test"},
                "template": "t",
                "target": "label",
            },
        }
        (here / "evaluation.json").write_text(json.dumps(record))
    (run,) = read_runs([tmp_path / "base", tmp_path / "mine"])
    assert run.comparison is not None
    assert run.comparison.summary.best == "mine"
    assert run.comparison.summary.arms["base"].against_best.high < 0  # type: ignore[union-attr]
    text = as_html([page(run, 1)])
    assert "Costs" not in text
    assert as_csv([run]).startswith("run,arm,")
    (tmp_path / "mine" / "evaluation.json").write_text(json.dumps({**record, "complete": False}))
    with pytest.raises(DataError, match="was interrupted"):
        read_runs([tmp_path / "mine"])


def test_a_tuning_run_has_a_page_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [
        {"event": "Started", "steps": 2},
        {"event": "Validated", "step": 0, "nll": 5.0},
        {"event": "Stepped", "step": 1, "nll": 4.0},
        {"event": "Validated", "step": 2, "nll": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in events) + '{"event": "Ste'
    )
    (tmp_path / "recipe.yaml").write_text("base: builtin\n")
    notes = {
        "metrics": {
            "nll_base": 6.0,
            "nll_before": 5.0,
            "nll_after": 3.0,
            "judged_on": "validation",
            "steps": 2,
            "best_step": 2,
        }
    }
    (tmp_path / "softprompt.json").write_text(
        json.dumps({"name": "mine", "kind": "soft", "length": 4, "base": {"name": "builtin"}, "notes": notes})
    )
    assert main(["report", str(tmp_path), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["written"]
    assert [Path(one).name for one in written] == ["report.html", "report.md", "report.csv", "report.json"]
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "6.000 nats per token for the base alone, 3.000 with it" in text
    assert text.count("<svg") == 2


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="softprompt compare, evaluate --out or tune"):
        read_runs([tmp_path])


def test_figures_are_written_for_people_and_unknown_ones_say_so() -> None:
    assert figures.count(6_836_736) == "6,836,736"
    assert figures.size(20_600) == "20.6 KB"
    assert figures.seconds(0.123) == "0.12 s"
    assert figures.seconds(3_725) == "1 h 02 min"
    assert figures.estimate(Figure(0.5, 0.01, 9), rows=True) == "0.500 ± 0.010 (n=9)"
    for told in (figures.count, figures.size, figures.seconds, figures.number):
        assert told(None) == told(float("nan")) == "unknown"  # type: ignore[operator]
    assert figures.difference(Difference(-0.1, -0.2, 0.0, 9)) == "\u22120.100 [\u22120.200, 0.000]"


def test_charts_hold_one_value_zeros_and_gaps() -> None:
    nan = float("nan")
    assert "unknown" in charts.bars([charts.Bar("soft", "soft", nan, nan, nan, "")], title="t", axis="a")
    one = charts.scatter(
        [charts.Point("soft", "soft", 0.0, 0.5, nan, nan)], title="t", x_axis="x", y_axis="y", better="higher"
    )
    assert one.count("<circle") == 1
    assert (
        charts.scatter(
            [charts.Point("soft", "soft", nan, 0.5, 0, 1)], title="t", x_axis="x", y_axis="y", better="higher"
        )
        == ""
    )
    assert charts.lines([], title="t", x_axis="x", y_axis="y") == ""
    assert "<polyline" in charts.lines(
        [charts.Line("soft", [(1, 2.0), (2, nan), (3, 2.0), (4, 1.5)])], title="t", x_axis="x", y_axis="y"
    )
    assert "&lt;b&gt;" in charts.bars([charts.Bar("x", "<b>", 1, 0, 2, "")], title="<b>", axis="a")


def test_two_points_are_not_joined_and_losses_that_fall_manyfold_have_a_logarithmic_axis() -> None:
    two = charts.lines([charts.Line("soft", [(0, 3.0), (9, 2.0)])], title="t", x_axis="x", y_axis="y")
    assert "<polyline" not in two
    assert two.count("<circle") == 2
    points = [(0, 10.0), (1, 1.0), (2, 0.1)]
    steep = charts.lines([charts.Line("soft", points)], title="t", x_axis="x", y_axis="y")
    (drawn,) = re.findall(r'points="([^"]*)"', steep)
    heights = [float(place.split(",")[1]) for place in drawn.split()]
    assert heights[1] - heights[0] == pytest.approx(
        heights[2] - heights[1], abs=0.2
    )  # equal ratios, equal steps
    assert ">0.1<" in steep


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("softprompt compare --data /home/ann/secret/rows.csv", "softprompt compare --data …/rows.csv"),
        ("source: /data/rows.csv\nout: '/tmp/a b'", "source: …/rows.csv\nout: '…/a b'"),
        ("--out=/home/ann/x", "--out=…/x"),
        ("C:\\Users\\ann\\rows.csv", "…/rows.csv"),
        ("~/work/rows.csv", "…/rows.csv"),
        ("yes/no/maybe and 1/2/3", "yes/no/maybe and 1/2/3"),
        ("https://host/a/b", "https://host/a/b"),
        ("data/rows.csv", "data/rows.csv"),
    ],
)
def test_absolute_paths_are_cut_to_their_last_name(text: str, shown: str) -> None:
    assert without_folders(text) == shown
    assert without_folders({text: [text]}) == {shown: [shown]}


def test_a_report_names_no_folder_of_its_writer_and_takes_no_text_for_markup(tmp_path: Path) -> None:
    secret = "/home/ann/clients"
    made = comparison(
        tmp_path,
        {"base": 2, "soft": 30},
        seeds=1,
        command=f"softprompt compare --data {secret}/rows.csv ``` <script>alert(1)</script>",
        data={"source": f"{secret}/rows.csv", "judged_on": "test", "rows": {"judged": 40}},
        recipe={"data": {"source": f"{secret}/rows.csv"}},
        failed={"deep": f"see {secret}/log.txt <img src=x onerror=alert(1)>"},
    )
    assert made.failed
    for path in write_reports([tmp_path], tmp_path / "out"):
        text = path.read_text("utf-8")
        assert secret not in text, path
        if path.suffix == ".html":
            assert "<script>alert" not in text
            assert "<img" not in text
        if path.suffix == ".md":
            assert "````\nsoftprompt compare" in text  # a longer fence than the one inside
            assert "<img" not in text.replace("\\<img", "")


def test_markdown_keeps_its_tables_whole(compared: tuple[Comparison, Path]) -> None:
    (run,) = read_runs([compared[1]])
    text = as_markdown([page(run, 1)])
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block
    assert "<script" not in text.replace("\\<script", "").split("Command:")[0]


def test_the_report_needs_no_torch() -> None:
    code = "import sys; import softprompt.report.render; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)

# What a reader would see, measured by the browser itself.
MEASURE = """<script>
addEventListener("load", () => {
  const box = document.querySelector(".samples input");
  const shown = () => [...document.querySelectorAll(".sample")].filter(one => one.offsetParent !== null).length;
  const before = shown();
  if (box) box.click();
  const after = shown();
  const wide = [...document.querySelectorAll("body *")].filter(one => !one.closest(".scroll, pre, svg")
    && one.getBoundingClientRect().right > innerWidth + 1).map(one => one.tagName + "." + one.className);
  const texts = [...document.querySelectorAll("svg")].flatMap(svg => {
    const frame = svg.getBoundingClientRect();
    return [...svg.querySelectorAll("text")].map(one => one.getBoundingClientRect())
      .filter(one => one.left < frame.left - 2 || one.right > frame.right + 2 || one.height < 7);
  }).length;
  document.title = JSON.stringify({before, after, wide, texts, width: innerWidth,
    scrolls: document.documentElement.scrollWidth > innerWidth + 1, ink: getComputedStyle(document.body).color});
});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to look at the page in a real browser")
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_real_browser_nothing_sticks_out_and_the_samples_can_be_narrowed(
    compared: tuple[Comparison, Path], tmp_path: Path, width: int
) -> None:
    report = (compared[1] / "report.html").read_text("utf-8").replace("</body>", MEASURE)
    (tmp_path / "page.html").write_text(report, encoding="utf-8")
    # A window is at least 500 wide; a frame is as narrow as a phone.
    (tmp_path / "frame.html").write_text(
        f'<body style="margin:0"><iframe id="f" src="page.html" width="{width}" height="900"></iframe><script>'
        'const look = () => { const title = document.getElementById("f").contentDocument.title; '
        'if (title.startsWith("{")) { document.title = ""; document.body.textContent = title; } '
        "else setTimeout(look, 200); }; setTimeout(look, 1500)</script></body>",
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--allow-file-access-from-files",
            "--virtual-time-budget=20000",
            f"--window-size={max(500, width)},1000",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = re.search(r"<body[^>]*>(\{.*\})</body>", done.stdout, re.DOTALL)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    seen = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["width"] == width
    assert seen["wide"] == []
    assert not seen["scrolls"]
    assert seen["texts"] == 0
    assert 0 < seen["after"] < seen["before"]


def test_three_cards_answer_first_and_the_table_is_sorted_by_the_figure(tmp_path: Path) -> None:
    """Of 40 rows: 39 and 39 right are level, 2 are worse; a soft prompt is 20.6 KB and a full copy 13.7 MB."""
    made = comparison(tmp_path / "cards", {"base": 2, "full": 39, "soft": 39}, seeds=1)
    chosen = picks(made)
    assert chosen is not None
    assert chosen.best == "full"  # the first of equals
    assert (chosen.cheapest, chosen.recommended) == ("soft", "soft")
    shown = page(ReportedRun("cards", "comparison", comparison=made), 1)
    assert [(card.title, card.arm) for card in shown.cards] == [
        ("Best accuracy", "full"),
        ("Cheapest within 0.02 of it", "soft"),
        ("Recommended", "soft"),
    ]
    assert [row[0] for row in shown.sections[0].tables[0].rows] == ["full", "soft", "base"]
    assert as_html([shown]).count('class="card arm') == 3


def test_quality_is_drawn_against_the_positions_in_front_of_a_request(tmp_path: Path) -> None:
    """A few-shot block of 90.5 positions on average, right in 30 of 40, beside a soft prompt of 20, right in 39."""
    right = {"base": 2, "few-shot": 30, "soft": 39}
    made = comparison(tmp_path / "positions", {**right, "context": 30}, seeds=1)
    shown = page(ReportedRun("positions", "comparison", comparison=made), 1)
    charts_of = {chart.title: str(chart.svg) for section in shown.sections for chart in section.charts}
    plain = page(ReportedRun("two", "comparison", comparison=comparison(tmp_path / "two", right, seeds=1)), 1)
    (costs,) = (section for section in plain.sections if section.id == "tradeoff")
    assert [chart.title for chart in costs.charts] == [
        "Quality against bytes kept for a task",
        "Quality against time for a new token",
    ]
    drawn = charts_of["Quality against positions in front of a request"]
    for label, right, positions in (("base", 2, 0), ("few-shot", 30, 90), ("soft", 39, 20)):
        assert f"{label}: {right / 40:.3f} at {positions}</title>" in drawn


def test_the_front_is_of_the_arms_that_none_beats_in_figure_and_cost() -> None:
    def arm(name: str, cost: float, figure: float) -> charts.Point:
        return charts.Point(name, name, cost, figure, nan, nan)

    arms = [
        arm("full", 270e6, 0.94),  # dearer and worse than lora
        arm("lora", 9.8e6, 0.95),
        arm("soft", 23e3, 0.85),
        arm("prompt", 516, 0.18),
        arm("few-shot", 516, 0.12),  # the same bytes, worse
        arm("base", 0, 0.18),  # as good as prompt for nothing
    ]
    assert [point.arm for point in charts.pareto_front(arms, higher=True)] == ["base", "soft", "lora"]
    losses = [arm("a", 0, 2.0), arm("b", 1, 2.0), arm("c", 5, 0.5), arm("d", 9, 0.7)]
    assert [point.arm for point in charts.pareto_front(losses, higher=False)] == ["a", "c"]
    drawn = charts.scatter(arms, title="t", x_axis="bytes", y_axis="accuracy", better="higher")
    assert drawn.count('class="front"') == 1
    alone = charts.scatter(
        [arm("b", 1, 0.2), arm("a", 0, 0.3)], title="t", x_axis="x", y_axis="y", better="higher"
    )
    assert 'class="front"' not in alone


@pytest.mark.parametrize(
    ("wanted", "answer", "mark"),
    [
        ("return", " return\n", "right"),
        ("return", "Delivery, Return, payment", "says more"),
        ("return", "The kind is return.", "says more"),
        ("return", "delivery", "wrong"),
        ("return", "", "wrong"),
        ("", "delivery", "wrong"),
    ],
)
def test_an_answer_that_holds_the_label_and_more_has_a_mark_of_its_own(
    wanted: str, answer: str, mark: str
) -> None:
    sample = Sample("Where is it?", wanted, {"base": answer}, {"base": answer.strip() == wanted})
    assert sample.mark("base") == mark
    shown = Page("p", "t", "", "", [Section("samples", "Samples", samples=[sample])])
    assert f'<span class="{mark.replace(" ", "-")}">' in as_html([shown])
    assert f"({mark})" in as_markdown([shown])


def test_text_that_is_continued_is_neither_right_nor_wrong() -> None:
    assert Sample("Once", "", {"base": "upon"}, {"base": None}).mark("base") == ""


@pytest.mark.parametrize(
    ("template", "target", "title"),
    [
        ("{soft:2}{text} Kind: {label}", "label", "Label from text: rows.csv on a/base"),
        ("{soft:2}{a}\n{b}: {kind}", "kind", "Kind from a and b: rows.csv on a/base"),
        ("{soft:2}{text}", None, "rows.csv on a/base"),
    ],
)
def test_a_title_says_what_the_task_is(template: str, target: str | None, title: str, tmp_path: Path) -> None:
    comparison(
        tmp_path,
        {"base": 2, "soft": 30},
        seeds=1,
        template=template,
        target=target,
        data={"source": "rows.csv", "judged_on": "test", "rows": {"judged": 40}},
        base={"name": "./a/base"},
    )
    (run,) = read_runs([tmp_path])
    assert run.title == title


def test_samples_show_the_rows_own_text_without_the_lines_of_a_chat_template(tmp_path: Path) -> None:
    chat = "<|user|>\n{text}<|end|>\n<|assistant|>\n"
    made = comparison(
        tmp_path,
        {"base": 2, "soft": 30},
        seeds=1,
        template="{soft:3}" + chat + "{label}<|end|>",
        target="label",
    )
    assert made.target == "label"
    for path in (tmp_path / "arms").rglob("rows.jsonl"):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for number, row in enumerate(rows):
            row["input"] = chat.replace("{text}", f"Where is parcel {number}?\nSoon?")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (run,) = read_runs([tmp_path])
    assert run.samples[0].input == "Where is parcel 0?\nSoon?"
    section = next(section for section in page(run, 1).sections if section.id == "samples")
    assert "lines before and after each input are left out" in section.text[0]
