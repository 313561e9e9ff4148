"""Figures against hand arithmetic and the packages that define them."""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from softprompt.data.example import Example
from softprompt.data.source import load_splits
from softprompt.data.template import Template
from softprompt.errors import DataError, MissingExtra, RecipeError
from softprompt.evaluation import interval, metric, overlap
from softprompt.evaluation.evaluate import Answer, judge_rows
from softprompt.evaluation.interval import Difference, rows_to_settle
from softprompt.evaluation.metric import METRICS, Estimate, confusion, metrics_named
from softprompt.evaluation.rows import Row


def row(said: str | None, wanted: str, index: int = 0, **more: float) -> Row:
    return Row(index, index, "?", wanted, said, **more)  # type: ignore[arg-type]


def rows(*pairs: tuple[str | None, str]) -> list[Row]:
    return [row(said, wanted, index) for index, (said, wanted) in enumerate(pairs)]


def loss(nll: float, tokens: int, text_bytes: int) -> Row:
    return Row(0, 0, "?", "x", None, nll=nll, tokens=tokens, text_bytes=text_bytes)


SAID_AND_WANTED = [
    ("the cat sat on the mat", "a cat sat on a mat"),
    ("It's 7 o'clock, isn't it?", "It is seven o'clock."),
    ("", "something at all"),
    ("nothing alike", "quite other words here"),
    ("Blue Spice is a coffee shop in the city centre.", "Blue Spice is a coffee shop in city centre ."),
]


def test_an_estimate_prints_its_error_and_n_and_what_is_unknown_says_so() -> None:
    assert str(Estimate(0.75, 0.031, 200)) == "0.750 ± 0.031 (n=200)"
    assert str(Estimate(math.nan, math.nan, 3)) == "unknown (n=3)"
    assert str(Estimate(1.0, math.nan, 1)) == "1.000 ± unknown (n=1)"


def test_accuracy_is_a_mean_with_the_usual_standard_error() -> None:
    found = METRICS["accuracy"].estimate(rows(("a", "a"), (" b ", "b"), ("a", "b"), ("c", "c")))
    assert found.value == 0.75
    assert found.stderr == pytest.approx(statistics.stdev([1, 1, 0, 1]) / 2)
    assert found.n == 4


def test_macro_f1_by_hand() -> None:
    # a: hit 2, missed 0, wrong 1 -> 4/5; b: hit 1, missed 1, wrong 0 -> 2/3; c: missed 1, wrong 0 -> 0.
    given = rows(("a", "a"), ("a", "a"), ("b", "b"), ("a", "b"), ("nonsense", "c"))
    assert METRICS["macro_f1"].estimate(given).value == pytest.approx((4 / 5 + 2 / 3 + 0) / 3)


def test_macro_f1_weighs_labels_and_accuracy_weighs_rows() -> None:
    given = rows(*[("often", "often")] * 9, ("often", "rare"))
    assert METRICS["accuracy"].estimate(given).value == 0.9
    assert METRICS["macro_f1"].estimate(given).value == pytest.approx((18 / 19) / 2)


def test_the_confusion_table_counts_rows_by_wanted_and_said_label() -> None:
    found = confusion(rows(("a", "a"), ("b", "a"), ("b", "b"), ("something else", "b")))
    assert found.labels == ("a", "b")
    assert found.table == ((1, 1), (0, 1))
    assert found.other == (0, 1)


@pytest.mark.parametrize(
    ("said", "wanted", "same"),
    [
        ("So it is 18.\n#### 18", "9 * 2 = <<9*2=18>>18\n#### 18", True),
        ("The answer is 1,800 dollars.", "#### 1800", True),
        ("#### $18.00", "#### 18", True),
        ("#### -3", "#### 3", False),
        ("18 apples and 2 pears", "#### 18", False),
        ("no number", "#### 18", False),
        ("", "no number wanted", False),
        ("#### 5 of 7", "#### 5", True),
    ],
)
def test_numbers_are_compared_by_value_after_gsm8ks_mark_or_at_the_end(
    said: str, wanted: str, same: bool
) -> None:
    assert METRICS["numeric_match"].estimate(rows((said, wanted))).value == float(same)


def test_token_f1_by_hand() -> None:
    # Articles and punctuation fall away: "cat sat" and "cat ran far" share 1 word of 2 and 3.
    assert overlap.word_f1("The cat sat.", "a cat ran far") == pytest.approx(2 * 1 / (2 + 3))
    assert overlap.word_f1("the", "a") == 1.0
    assert overlap.word_f1("word", "the") == 0.0


def test_rouge_l_by_hand_and_as_the_rouge_score_package_has_it() -> None:
    assert overlap.rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(3 / 4)
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="compares with rouge-score if installed")
    theirs = scorer.RougeScorer(["rougeL"])
    for said, wanted in SAID_AND_WANTED:
        assert overlap.rouge_l(said, wanted) == pytest.approx(theirs.score(wanted, said)["rougeL"].fmeasure)


def test_bleu_and_chrf_are_sacrebleus_corpus_figures() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="compares with sacrebleu if installed")
    said, wanted = (list(side) for side in zip(*SAID_AND_WANTED, strict=True))
    given = rows(*SAID_AND_WANTED)
    bleu = METRICS["bleu"].estimate(given)
    assert bleu.value == pytest.approx(sacrebleu.corpus_bleu(said, [wanted]).score)
    assert METRICS["chrf"].estimate(given).value == pytest.approx(sacrebleu.corpus_chrf(said, [wanted]).score)
    one_left_out = [
        sacrebleu.corpus_bleu(said[:i] + said[i + 1 :], [wanted[:i] + wanted[i + 1 :]]).score
        for i in range(len(said))
    ]
    assert bleu.stderr == pytest.approx(statistics.pstdev(one_left_out) * math.sqrt(len(said) - 1))


def test_bleu_without_sacrebleu_says_what_to_install_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "sacrebleu"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    metric.sacrebleu_metric.cache_clear()
    with pytest.raises(MissingExtra, match=r"pip install 'softprompt\[eval\]'") as told:
        metrics_named(["bleu"])
    assert "\n" not in str(told.value)


def test_loss_and_perplexity_per_token_and_per_byte_by_hand() -> None:
    given = [loss(2.0, 4, 10), loss(4.0, 4, 20)]  # 6 nats, 8 tokens, 30 bytes
    found = {name: METRICS[name].estimate(given).value for name in METRICS if METRICS[name].needs == "loss"}
    assert found == pytest.approx(
        {
            "nll": 0.75,
            "perplexity": math.exp(0.75),
            "bits_per_byte": 0.2 / math.log(2),
            "byte_perplexity": math.exp(0.2),
        }
    )


def test_what_was_not_measured_is_nan_and_never_zero() -> None:
    answered, scored = rows(("a", "a")), [loss(1.0, 1, 1)]
    for name, one in METRICS.items():
        missing = answered if one.needs == "loss" else scored
        assert math.isnan(one.estimate(missing).value), name
        assert math.isnan(one.estimate([]).value), name


def test_an_unknown_metric_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'accuracy'"):
        metrics_named(["acuracy"])


# Student's table: degrees of freedom, and the value that 97.5 % stay below.
@pytest.mark.parametrize(
    ("freedom", "value"),
    [(1, 12.706), (2, 4.3027), (3, 3.1824), (10, 2.2281), (30, 2.0423), (120, 1.9799), (1e9, 1.95996)],
)
def test_students_quantiles_are_those_of_the_table(freedom: float, value: float) -> None:
    assert interval.student_quantile(0.975, freedom) == pytest.approx(value, rel=1e-4)


def test_a_paired_difference_is_the_t_interval_of_the_row_differences() -> None:
    ours = rows(("a", "a"), ("a", "a"), ("a", "a"), ("b", "a"), ("a", "a"))
    theirs = rows(("a", "a"), ("b", "a"), ("b", "a"), ("b", "a"), ("a", "a"))
    found = METRICS["accuracy"].difference([ours], [theirs])
    differences = [0, 1, 1, 0, 0]
    reach = 2.7764 * statistics.stdev(differences) / math.sqrt(5)  # Student's table, 4 degrees of freedom
    assert found.value == pytest.approx(0.4)
    assert (found.low, found.high) == pytest.approx((0.4 - reach, min(1.0, 0.4 + reach)), rel=1e-4)
    assert not found.sure


# By hand, with half a row added to each cell of the table of both arms' answers (Agresti and Min 2005); Student's table with n + 1
# degrees of freedom: 3.1824, 2.3646 and 2.0096.
@pytest.mark.parametrize(
    ("ours", "theirs", "count", "low", "high", "sure"),
    [
        ("a", "b", 2, 0.5 - 3.1824 * math.sqrt(2) / 4, 1.0, False),
        ("a", "b", 6, 0.75 - 2.3646 * math.sqrt(2.5) / 8, 1.0, True),
        ("b", "a", 6, -1.0, -0.75 + 2.3646 * math.sqrt(2.5) / 8, True),
        ("a", "a", 48, -2.0096 / 50, 2.0096 / 50, False),
        ("b", "b", 48, -2.0096 / 50, 2.0096 / 50, False),
    ],
)
def test_a_few_rows_that_all_agree_do_not_settle_a_difference(
    ours: str, theirs: str, count: int, low: float, high: float, sure: bool
) -> None:
    found = METRICS["accuracy"].difference([rows(*[(ours, "a")] * count)], [rows(*[(theirs, "a")] * count)])
    assert found.value == (ours == "a") - (theirs == "a")
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-4)
    assert found.sure is sure


def test_more_rows_that_agree_say_more_than_one_that_does_not() -> None:
    same = rows(*[("a", "a")] * 100)
    one_wrong = rows(*[("a", "a")] * 99, ("b", "a"))
    all_agree = METRICS["accuracy"].difference([same], [same])
    one_apart = METRICS["accuracy"].difference([same], [one_wrong])
    assert all_agree.high - all_agree.low <= one_apart.high - one_apart.low


def test_losses_that_are_the_same_to_the_bit_differ_by_nothing() -> None:
    same = [loss(1.5, 1, 1), loss(0.5, 2, 2), loss(2.0, 1, 3)]
    found = METRICS["nll"].difference([same], [same])
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_pairs_tell_a_difference_that_two_separate_intervals_would_hide() -> None:
    rng = random.Random(0)
    hard = [rng.random() < 0.5 for _ in range(200)]
    ours = rows(*[("b" if one else "a", "a") for one in hard])
    theirs = rows(*[("b" if one or i % 20 == 0 else "a", "a") for i, one in enumerate(hard)])
    apart = METRICS["accuracy"].estimate(ours), METRICS["accuracy"].estimate(theirs)
    assert apart[0].value - apart[1].value < 2 * math.hypot(apart[0].stderr, apart[1].stderr)
    assert METRICS["accuracy"].difference([ours], [theirs]).sure


def test_the_spread_between_seeds_widens_the_interval() -> None:
    steady = rows(*[("a", "a")] * 6, *[("b", "a")] * 4)
    better = rows(*[("a", "a")] * 9, ("b", "a"))
    worse = rows(*[("a", "a")] * 3, *[("b", "a")] * 7)
    calm = METRICS["accuracy"].over_seeds([steady, steady])
    wild = METRICS["accuracy"].over_seeds([better, worse])
    assert calm.value == pytest.approx(wild.value)
    assert calm.stderr == pytest.approx(METRICS["accuracy"].estimate(steady).stderr)
    assert wild.stderr > 1.5 * calm.stderr


def test_runs_on_other_rows_are_refused_and_not_compared() -> None:
    ours, theirs = rows(("a", "a"), ("b", "b")), rows(("a", "a"), ("b", "c"))
    with pytest.raises(ValueError, match="different rows"):
        METRICS["accuracy"].difference([ours], [theirs])
    with pytest.raises(ValueError, match="same seeds"):
        METRICS["accuracy"].difference([ours] * 2, [ours] * 3)


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    [
        (8, 10, 0.4901625, 0.9433178),  # R: prop.test(8, 10, correct = FALSE)
        (0, 20, 0.0, 0.1611252),  # z^2 / (n + z^2)
        (20, 20, 0.8388748, 1.0),
    ],
)
def test_a_proportion_has_wilsons_interval(right: int, rows: int, low: float, high: float) -> None:
    judged = [Row(i, i, "", "a", "a" if i < right else "b") for i in range(rows)]
    assert METRICS["accuracy"].interval([judged]) == pytest.approx((low, high), abs=1e-6)


def test_intervals_stay_within_what_a_metric_can_be() -> None:
    """Over two seeds of few rows, where Student's interval with one degree of freedom would leave them."""
    seeds = [[Row(i, i, "", "a", "a" if i < k else "b", 1.0, 1, 1) for i in range(6)] for k in (6, 3)]
    other = [[Row(i, i, "", "a", "b", 1.0, 1, 1) for i in range(6)] for _ in range(2)]
    for name in ("accuracy", "macro_f1", "rouge_l", "chrf"):
        metric = METRICS[name]
        low, high = metric.interval(seeds)
        assert metric.bounds[0] <= low < high <= metric.bounds[1]
        found = metric.difference(seeds, other)
        assert -metric.bounds[1] <= found.low <= found.high <= metric.bounds[1]
    assert METRICS["nll"].interval(seeds)[0] >= 0


def test_the_rows_that_would_settle_a_difference_follow_from_its_interval() -> None:
    assert rows_to_settle(Difference(0.1, -0.1, 0.3, 50), 0.02) == pytest.approx(
        4
    )  # half the width: four times
    assert rows_to_settle(Difference(0.0, -0.04, 0.04, 50), 0.02) == pytest.approx(
        4
    )  # to lie within the margin
    assert rows_to_settle(Difference(0.0, -0.04, 0.04, 50), 0.0) == math.inf


def test_bleu_and_chrf_take_the_rows_of_one_input_as_its_references() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    said = {"a": "the cheap place by the river serves food", "b": "it is a pub for families near the centre"}
    wanted = {
        "a": ["a cheap place by the river", "the place by the river serves cheap food"],
        "b": ["a family pub near the centre", "it is a pub near the centre for families"],
    }
    examples = [Example({"x": x, "y": y}) for x in "ab" for y in wanted[x]]
    layout = Template.parse("{x} {y}", target="y")
    metrics = metrics_named(["bleu", "chrf", "rouge_l"])

    def answer(asked: Sequence[Example]) -> list[Answer]:
        return [Answer(text=said[example.fields["x"]]) for example in asked]

    judged = judge_rows(answer, examples, metrics, layout)
    streams = [[wanted[x][place] for x in "ab"] for place in range(2)]
    for name, theirs in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        whole = theirs.corpus_score([said[x] for x in "ab"], streams).score
        assert judged.estimates[name].value == pytest.approx(whole, rel=1e-6)
    assert judged.estimates["rouge_l"].n == 4


REFERENCES = {
    "a": ["a cheap place by the river", "the place by the river serves cheap food"],
    "b": ["a family pub near the centre", "it is a pub near the centre for families"],
}
SPOKEN = {"a": "the cheap place by the river serves food", "b": "it is a pub for families near the centre"}


@pytest.mark.parametrize("rows", ["jsonl", "parquet", "pandas", "examples"])
def test_bleu_and_chrf_take_a_column_of_lists_as_references(tmp_path: Path, rows: str) -> None:
    """The target is one right answer and the list holds others; sacrebleu is given both as its streams."""
    sacrebleu = pytest.importorskip("sacrebleu")
    data: Any = [{"x": x, "y": texts[0], "also": texts[1:]} for x, texts in REFERENCES.items()]
    references: str | None = "also"
    if rows == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in data)
        (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
        data = tmp_path / "rows.jsonl"
    elif rows == "parquet":
        pyarrow = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").Table.from_pylist(data)
        pyarrow.write_table(table, tmp_path / "rows.parquet")
        data = tmp_path / "rows.parquet"
    elif rows == "pandas":
        data = pytest.importorskip("pandas").DataFrame(data)
    else:
        data = [Example({"x": row["x"], "y": row["y"]}, references=tuple(row["also"])) for row in data]
        references = None
    examples = load_splits(data, target="y", references=references, validation=0).train
    layout = Template.parse("{x} {y}", target="y")

    def answer(asked: Sequence[Example]) -> list[Answer]:
        return [Answer(text=SPOKEN[example.fields["x"]]) for example in asked]

    judged = judge_rows(answer, examples, metrics_named(["bleu", "chrf", "rouge_l"]), layout)
    streams = [[REFERENCES[x][place] for x in "ab"] for place in range(2)]
    for name, theirs in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        whole = theirs.corpus_score([SPOKEN[x] for x in "ab"], streams).score
        first_alone = theirs.corpus_score([SPOKEN[x] for x in "ab"], streams[:1]).score
        assert judged.estimates[name].value == pytest.approx(whole, rel=1e-6)
        assert whole != pytest.approx(first_alone)
    # rouge_l compares with the target alone: 2 * LCS / (words of both), counted by hand.
    assert judged.estimates["rouge_l"].value == pytest.approx((2 * 5 / (8 + 6) + 2 * 5 / (9 + 6)) / 2)


@pytest.mark.parametrize(
    ("cell", "found"), [("one text", "str"), ([["nested"]], "a list of other things"), (3, "int")]
)
def test_references_that_are_no_list_of_texts_are_refused_with_their_row(cell: object, found: str) -> None:
    with pytest.raises(DataError, match=f"row 1, column 'also': found {found}, wanted a list of texts"):
        load_splits([{"y": "a", "also": None}, {"y": "b", "also": cell}], references="also", target="y")
    with pytest.raises(DataError, match=r"no column 'alsoo'.*Change data\.references"):
        load_splits([{"y": "a", "also": ["b"]}], references="alsoo", target="y")
