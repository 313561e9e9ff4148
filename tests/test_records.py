"""Records on disk: what was written is read back, those of version 0.1 too, and damaged ones are refused in one line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from softprompt.comparison.records import ArmResult, Comparison
from softprompt.comparison.settings import CompareSettings, Job
from softprompt.errors import DataError
from softprompt.evaluation.record import read_json
from softprompt.evaluation.rows import Row, RowFile, read_rows
from softprompt.report.read import read_runs
from softprompt.report.render import write_reports
from softprompt.store.json_values import plain

OLD = Path(__file__).parent / "records_0_1"


def changed(record: Any, path: str, value: Any) -> Any:
    """The record with the value at a dotted path replaced; a number picks from a list."""
    name, _, rest = path.partition(".")
    key: Any = int(name) if name.isdecimal() else name
    inner = changed(record[key], rest, value) if rest else value
    if isinstance(record, list):
        return [inner if place == key else item for place, item in enumerate(record)]
    return {**record, key: inner}


def test_a_comparison_of_version_0_1_is_read_with_its_own_figures() -> None:
    record = json.loads((OLD / "compared" / "comparison.json").read_text())
    comparison = Comparison.read(OLD / "compared" / "comparison.json")
    assert "schema" not in record
    for arm, old in record["summary"]["arms"].items():
        new = comparison.summary.arms[arm]
        assert {name: figure.value for name, figure in new.metrics.items()} == {
            name: figure["value"] for name, figure in old["metrics"].items()
        }
        assert new.stored_bytes == old["stored_bytes"]
        assert new.against_best is not None
        assert new.against_best.low == old["against_best"]["low"]
    assert comparison.settings is not None
    assert comparison.settings.judge_rows == record["settings"]["limit"] == 6
    assert comparison.recipe == record["settings"]["recipe"]
    assert comparison.runs["soft"][1].curve[0].nll == record["runs"]["soft"][1]["curve"][0]["nll"]
    assert comparison.health is not None
    assert comparison.health.splits["train"].labels == record["health"]["splits"]["train"]["labels"]


def test_every_record_of_version_0_1_has_its_page(tmp_path: Path) -> None:
    folders = [OLD / name for name in ("compared", "judged", "tuned")]
    write_reports(folders, tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "0.750 ± 0.139" in page  # the soft prompt's accuracy in the report of that version
    assert "0.865" in page  # the tuning run's held-out loss
    runs = read_runs(folders)
    assert [run.kind for run in runs] == ["comparison", "tuning", "evaluations"]
    assert runs[0].samples
    job = Job.load(OLD / "compared" / "arms" / "soft-0")
    assert (job.arm, job.seed, job.settings.shots, job.recipe.tune.max_steps) == ("soft", 0, 4, 3)


@pytest.mark.parametrize("kind", [Comparison, ArmResult])
def test_a_record_comes_back_as_it_was_written(kind: type[Comparison | ArmResult]) -> None:
    name = "comparison.json" if kind is Comparison else "arms/soft-0/result.json"
    read = kind.from_record(read_json(OLD / "compared" / name))
    record = read.to_record()
    assert record["schema"] == 2
    assert "NaN" not in json.dumps(record)
    assert kind.from_record(json.loads(json.dumps(record))).to_record() == record


BROKEN = [
    ("compared/comparison.json", "summary.arms.soft.metrics.accuracy.value", "high"),
    ("compared/comparison.json", "summary", []),
    ("compared/comparison.json", "runs.soft", 3),
    ("compared/comparison.json", "runs.soft.0.validation.0.nll", {}),
    ("compared/comparison.json", "settings.seeds", "two"),
    ("compared/comparison.json", "base", None),
    ("compared/comparison.json", "schema", 99),
    ("judged/evaluation.json", "metrics", 5),
    ("judged/evaluation.json", "about", "me"),
    ("judged/evaluation.json", "confusion.labels", 7),
    ("tuned/softprompt.json", "notes", [1]),
    ("tuned/softprompt.json", "base", "builtin"),
]


@pytest.mark.parametrize(("file", "path", "value"), BROKEN)
def test_a_record_with_a_value_of_another_kind_is_refused_in_one_line(
    tmp_path: Path, file: str, path: str, value: Any
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(OLD / Path(file).parent, folder)
    target = folder / Path(file).name
    record = json.loads(target.read_text())
    target.write_text(json.dumps(changed(record, path, value)))
    with pytest.raises(DataError) as caught:
        read_runs([folder])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\x00"])
def test_a_file_that_is_no_record_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    for name in ("comparison.json", "evaluation.json", "softprompt.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(text)
        (folder / "metrics.jsonl").write_text('{"event": "Stepped", "step": 1, "nll": 2.0}\n')
        with pytest.raises(DataError) as caught:
            read_runs([folder])
        assert "\n" not in str(caught.value)


def test_events_of_other_kinds_are_no_points_on_a_curve(tmp_path: Path) -> None:
    lines = ["[]", "3", '"x"', '{"event": "Stepped"}', '{"event": "Stepped", "step": 1, "nll": "low"}']
    lines += ['{"event": "Validated", "step": 1, "nll": null}', '{"event": "Stepped", "step": 2, "nll": 1.5}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (run,) = read_runs([tmp_path])
    assert [list(series.points) for series in run.training] == [[(2.0, 1.5)]]
    assert run.validation == []


SEPARATORS = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\r\nh\x1ei"


def test_rows_are_records_however_many_line_separators_their_texts_hold(tmp_path: Path) -> None:
    rows = [Row(i, i, SEPARATORS, SEPARATORS, SEPARATORS, nll=1.0, tokens=1) for i in range(3)]
    file = RowFile(tmp_path, "digest")
    file.add(rows)
    file.close()
    assert (tmp_path / "rows.jsonl").read_bytes().count(b"\n") == 3
    assert list(read_rows(tmp_path / "rows.jsonl")) == rows
    again = RowFile(tmp_path, "digest")
    assert list(again.judged()) == rows
    again.close()


def test_what_is_not_known_is_null_and_comes_back_as_nan() -> None:
    assert plain({"a": [math.nan, (1.5, math.inf)]}) == {"a": [None, [1.5, None]]}
    result = ArmResult("soft")
    assert math.isnan(result.learning.rate)
    assert result.to_record()["learning"]["rate"] is None
    assert math.isnan(ArmResult.from_record(result.to_record()).learning.rate)


def test_renamed_settings_of_version_0_1_keep_their_values() -> None:
    old = {"limit": 5, "calibrated": True, "answers": "rank", "general_text": "a.txt", "batch_rows": 4}
    new = CompareSettings.of_record(old)
    assert (new.judge_rows, new.calibrate, new.general, new.batch_rows) == (5, True, "a.txt", 4)
