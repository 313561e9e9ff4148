"""Judging: every kind of prompt by one road, rows kept and taken up again, gates."""

from __future__ import annotations

import json
import math
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest
import torch
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from softprompt.base.frozen_lm import FrozenLM
from softprompt.cli.app import main
from softprompt.cli.evaluate import show
from softprompt.cli.screen import screen
from softprompt.data.example import Example, Splits
from softprompt.data.template import Template
from softprompt.errors import DataError, GateFailed, NotFinite, RecipeError
from softprompt.evaluation import judge
from softprompt.evaluation.evaluate import (
    Answer,
    default_metrics,
    demand,
    judge_rows,
    read_gates,
    wanted_text,
    written_out,
)
from softprompt.evaluation.judge import evaluate
from softprompt.evaluation.metric import METRICS, Estimate, metrics_named
from softprompt.evaluation.predictor import predictor, settled, text_prompt
from softprompt.evaluation.rows import Row, read_rows
from softprompt.evaluation.settings import JudgedData, JudgeSettings, MetricName
from softprompt.inference.compiled import TextPrompt, compile_prompt, vectors_state
from softprompt.prompt.soft_prompt import DeepPrompt, SoftPrompt
from softprompt.store.artifact import save_prompt
from softprompt.tuning.task import Task
from tiny_models import tiny_model, tiny_tokenizer

LABELLED = Template.parse("{soft:3}Tweet: {text} Complaint? {label}", target="label")
RUNNING = Template.parse("{soft:3}{text}")
ROWS = [
    Example({"text": text, "label": label}, row=row)
    for row, (text, label) in enumerate(
        [
            ("my order never came", "complaint"),
            ("thank you", "no complaint"),
            ("the quick help", "no complaint"),
        ]
    )
]
LOSSES = metrics_named(["nll", "bits_per_byte"])


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer())


def of_words(lm: FrozenLM, words: str, template: str, target: str | None) -> SoftPrompt:
    """A soft prompt of real token embeddings: it must judge as those words do."""
    ids = lm.tokenizer(words)["input_ids"]
    source = template.replace("{soft:3}", f"{{soft:{len(ids)}}}")
    return SoftPrompt(lm.embed(torch.tensor(ids)).float(), lm.fingerprint, source, target, name="words")


def losses(lm: FrozenLM, prompt: object, layout: Template, rows: Sequence[Example] = ROWS) -> list[Row]:
    compiled = compile_prompt(lm, prompt, template=layout) if not hasattr(prompt, "state") else prompt  # type: ignore[arg-type]
    predict = predictor(lm, compiled, layout, LOSSES, JudgeSettings())  # type: ignore[arg-type]
    return list(judge_rows(predict, rows, LOSSES, layout).rows)


@pytest.mark.parametrize(("template", "target"), [(str(LABELLED), "label"), (str(RUNNING), None)])
def test_a_soft_prompt_of_real_embeddings_a_deep_one_read_from_it_and_the_text_itself_judge_alike(
    lm: FrozenLM, template: str, target: str | None
) -> None:
    words = "Classify the text.\n"
    soft = of_words(lm, words, template, target)
    layout = Template.parse(soft.template, target=target)
    keys, values = vectors_state(lm, soft.embeddings_PD)
    deep = DeepPrompt(keys, values, lm.fingerprint, soft.template, target, name="deep")
    by_soft, by_deep = losses(lm, soft, layout), losses(lm, deep, layout)
    by_text = losses(lm, text_prompt(lm, layout, words), layout)
    for one, other, text in zip(by_soft, by_deep, by_text, strict=True):
        assert one.nll == pytest.approx(other.nll, rel=1e-4)
        assert one.nll == pytest.approx(text.nll, rel=1e-4)
        assert one.tokens == other.tokens == text.tokens
        assert one.text_bytes == other.text_bytes == text.text_bytes


def test_the_base_and_a_prompt_are_scored_on_the_same_tokens(lm: FrozenLM) -> None:
    alone = losses(lm, None, RUNNING)
    prompt = of_words(lm, "act as", str(RUNNING), None)
    under = losses(lm, prompt, Template.parse(prompt.template))
    counted = [len(lm.tokenizer(one.fields["text"])["input_ids"]) - 1 for one in ROWS]
    assert [row.tokens for row in alone] == [row.tokens for row in under] == counted


def test_the_loss_of_a_target_is_transformers_own(lm: FrozenLM) -> None:
    (row,) = losses(lm, None, LABELLED, ROWS[:1])
    context = lm.tokenizer("Tweet: my order never came Complaint?")["input_ids"]
    target = [*lm.tokenizer(" complaint")["input_ids"], lm.tokenizer.eos_token_id]
    ids = torch.tensor([context + target])
    labels = torch.tensor([[-100] * len(context) + target])
    with torch.no_grad():
        mean = lm.model(input_ids=ids, labels=labels).loss.item()
    assert row.tokens == len(target)
    assert row.nll == pytest.approx(mean * len(target), rel=1e-4)
    assert row.text_bytes == len(b" complaint")


def test_a_label_is_ranked_by_its_likelihood_and_calibration_takes_its_bias_away(lm: FrozenLM) -> None:
    metrics = metrics_named(["accuracy", "nll"])
    labels = ("complaint", "no complaint")
    base = compile_prompt(lm, None, template=LABELLED)
    rows = judge_rows(
        predictor(lm, base, LABELLED, metrics, JudgeSettings(answers="rank", labels=list(labels))),
        ROWS,
        metrics,
        LABELLED,
    ).rows
    for row in rows:
        assert row.scores is not None
        assert row.answer == max(labels, key=row.scores.__getitem__)
        assert row.scores[row.wanted] == pytest.approx(-row.nll, rel=1e-4)
    weighed = JudgeSettings(answers="rank", labels=list(labels), calibrate=True)
    after = judge_rows(predictor(lm, base, LABELLED, metrics, weighed), ROWS, metrics, LABELLED).rows
    empty = [Example({"text": text, "label": label}) for text in ("N/A", "...", "none") for label in labels]
    likely = [math.exp(-row.nll) for row in losses(lm, None, LABELLED, empty)]
    bias = {label: math.log(sum(likely[i::2]) / 3) for i, label in enumerate(labels)}
    for row in after:
        assert row.scores is not None
        scores = row.scores
        assert row.answer == max(labels, key=lambda label: scores[label] - bias[label])


def test_answers_are_generated_with_room_for_the_longest_wanted_one_and_end_at_a_line(lm: FrozenLM) -> None:
    asking = settled(JudgeSettings(), lm, LABELLED, ROWS)
    longest = len(lm.tokenizer("no complaint")["input_ids"])
    assert asking.max_new_tokens == math.ceil(longest * 1.25) + 2
    assert asking.stop == ["\n"]
    assert settled(JudgeSettings(), lm, LABELLED, [Example({"text": "x", "label": "two\nlines"})]).stop == []


def test_metrics_of_answers_need_a_target(lm: FrozenLM) -> None:
    with pytest.raises(RecipeError, match="no target"):
        predictor(
            lm,
            compile_prompt(lm, None, template=RUNNING),
            RUNNING,
            metrics_named(["accuracy"]),
            JudgeSettings(),
        )


class Fake:
    """Answers every text with its label, and remembers what it was asked; breaks at a row if told to."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.breaks_at = breaks_at

    def __call__(self, examples: Sequence[Example]) -> list[Answer]:
        if self.breaks_at in [one.row for one in examples]:
            raise KeyboardInterrupt
        self.asked += [one.row for one in examples]
        return [Answer(text=one.fields["label"], nll=1.0, tokens=2, text_bytes=4) for one in examples]


def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    metrics = metrics_named(["accuracy", "nll"])
    with pytest.raises(KeyboardInterrupt):
        judge_rows(Fake(breaks_at=2), ROWS, metrics, LABELLED, out=tmp_path, about={"a": 1}, chunk=1)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"index": 2, "row": 2, "inp')  # the kill came in the middle of a line
    fake = Fake()
    found = judge_rows(fake, ROWS, metrics, LABELLED, out=tmp_path, about={"a": 1}, chunk=1)
    assert fake.asked == [2]
    assert found.reused == 2
    assert [row.row for row in read_rows(tmp_path / "rows.jsonl")] == [0, 1, 2]
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["complete"]
    assert record["metrics"]["accuracy"]["value"] == 1.0
    assert record["metrics"]["nll"]["value"] == 0.5


def test_an_interrupted_evaluation_reads_its_rows_in_the_company_they_would_have_had(tmp_path: Path) -> None:
    """Rows that are read together may round otherwise than rows read alone: here the loss is their number."""

    class Together(Fake):
        def __call__(self, examples: Sequence[Example]) -> list[Answer]:
            nll = float(len(examples))
            return [replace(answer, nll=nll) for answer in super().__call__(examples)]

    rows = [Example({"text": "t", "label": "l"}, row=number) for number in range(7)]
    whole, kept = tmp_path / "whole", tmp_path / "kept"
    judge_rows(Together(), rows, metrics_named(["nll"]), LABELLED, out=whole, chunk=3)
    lines = (whole / "rows.jsonl").read_bytes().splitlines(keepends=True)
    for there in ([], [0, 1, 2, 3], [0, 2, 6], range(7)):
        judge_rows(Fake(), rows, metrics_named(["nll"]), LABELLED, out=kept, chunk=3)
        (kept / "rows.jsonl").write_bytes(b"".join(lines[index] for index in there))
        fake = Together()
        found = judge_rows(fake, rows, metrics_named(["nll"]), LABELLED, out=kept, chunk=3)
        assert found.reused == len(there)
        assert [row.to_line() for row in found.rows] == lines
        assert sorted((kept / "rows.jsonl").read_bytes().splitlines(keepends=True)) == lines
        # By hand: chunks of which every row is there are not asked again.
        assert fake.asked == {0: [*range(7)], 4: [3, 4, 5, 6], 3: [0, 1, 2, 3, 4, 5], 7: []}[len(there)]
        shutil.rmtree(kept)


def test_rows_without_an_answer_are_no_evaluation() -> None:
    with pytest.raises(ValueError, match="shorter"):
        judge_rows(lambda examples: Fake()(examples)[:-1], ROWS, metrics_named(["nll"]), LABELLED)


@pytest.mark.parametrize("change", ["about", "rows"])
def test_rows_of_another_evaluation_are_refused_and_not_mixed_in(tmp_path: Path, change: str) -> None:
    metrics = metrics_named(["accuracy"])
    judge_rows(Fake(), ROWS, metrics, LABELLED, out=tmp_path, about={"a": 1})
    rows = ROWS[:2] if change == "rows" else ROWS
    with pytest.raises(DataError, match="another evaluation"):
        judge_rows(Fake(), rows, metrics, LABELLED, out=tmp_path, about={"a": 2 if change == "about" else 1})


def test_a_row_comes_back_from_its_line_as_it_was() -> None:
    row = Row(3, 7, "Tweet: ü\n", "x", None, scores={"a": -1.5})
    again = Row.from_json(row.to_json())
    assert math.isnan(again.nll)
    assert again.scores == row.scores
    assert (again.index, again.row, again.input, again.answer) == (3, 7, "Tweet: ü\n", None)


def test_the_default_metrics_suit_the_task() -> None:
    many = [Example({"text": "x", "label": label}) for label in "aabb"]
    sums = [Example({"text": "x", "label": f"so\n#### {n}"}) for n in range(4)]
    long = [Example({"text": "x", "label": f"a sentence number {n}"}) for n in range(4)]
    assert default_metrics(LABELLED, many)[0] == "accuracy"
    assert default_metrics(LABELLED, sums)[0] == "numeric_match"
    assert default_metrics(LABELLED, long)[0] == "rouge_l"
    assert default_metrics(RUNNING, long)[0] == "nll"


def test_input_and_answer_are_the_template_filled_in() -> None:
    assert written_out(LABELLED, ROWS[0]) == "Tweet: my order never came Complaint? "
    assert wanted_text(LABELLED, ROWS[0]) == "complaint"
    assert wanted_text(RUNNING, ROWS[0]) == "my order never came"


@pytest.mark.parametrize(
    ("gate", "value", "passes"),
    [
        ("accuracy=0.8", 0.8, True),
        ("accuracy=0.8", 0.79, False),
        ("nll=2", 1.9, True),
        ("nll=2", 2.1, False),
        ("accuracy=0", math.nan, False),
    ],
)
def test_a_gate_is_a_least_figure_or_for_a_loss_a_highest(gate: str, value: float, passes: bool) -> None:
    (metric, _), *_ = gates = read_gates([gate])
    figures = {metric.name: Estimate(value, 0.0, 9)}
    if passes:
        demand(gates, figures)
    else:
        with pytest.raises(GateFailed, match=metric.name):
            demand(gates, figures)


@pytest.mark.parametrize("gate", ["accuracy", "acuracy=1", "accuracy=high"])
def test_a_gate_that_cannot_be_read_is_refused(gate: str) -> None:
    with pytest.raises(RecipeError):
        read_gates([gate])


def test_the_command_judges_base_text_and_learned_prompts_and_fails_a_gate_with_100(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = FrozenLM.load("builtin")
    layout = "{soft:3}Message: {text} Kind: {label}"
    ids = lm.tokenizer("Kind of message: ")["input_ids"][:3]
    prompt = SoftPrompt(lm.embed(torch.tensor(ids)).float(), lm.fingerprint, layout, "label", name="kind")
    save_prompt(prompt, tmp_path / "kind")
    data = ["--data", "builtin:messages", "--judge-rows", "6", "--json"]
    base = ["--template", layout, "--target", "label"]

    def record(*arguments: str) -> dict[str, object]:
        code = main(["evaluate", *arguments])
        shown = capsys.readouterr()
        assert code == 0, shown.err
        found: dict[str, object] = json.loads(shown.out)
        return found

    for arguments in (
        [*data, *base],
        [*data, *base, "--text", "Which kind is it?\n"],
        [*data, "--prompt", str(tmp_path / "kind")],
        [*data, *base, "--answers", "rank", "--calibrate"],
    ):
        metrics = record(*arguments)["metrics"]
        assert isinstance(metrics, dict)
        assert list(metrics) == ["accuracy", "macro_f1", "nll"]
        assert metrics["nll"]["n"] == 6
    assert main(["evaluate", *data, *base, "--fail-under", "accuracy=0.99"]) == 100
    assert "wanted at least 0.99" in capsys.readouterr().err


def test_the_command_says_how_little_a_few_rows_that_agree_tell(capsys: pytest.CaptureFixture[str]) -> None:
    """Wilson 1927, by hand: of 6 rows that are all right, the lower end is 6 / (6 + 1.959964^2)."""
    estimates = {"accuracy": Estimate(1.0, 0.0, 6), "nll": Estimate(0.5, 0.0, 6)}
    made = SimpleNamespace(estimates=estimates, reused=0, notes=(), about={}, confusion=None)
    show(screen(), cast(Any, made), "a prompt on rows")
    told = capsys.readouterr().out
    assert f"1.000 ± 0.000 (n=6), 95 % interval {6 / (6 + 1.959964**2):.3f} to 1.000" in told
    assert "0.500 ± 0.000 (n=6) nats per token\n" in told


def test_the_command_goes_on_with_a_folder_and_reads_the_data_of_the_prompts_own_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = FrozenLM.load("builtin")
    notes = {
        "recipe": {"data": {"source": "builtin:roles", "column": "prompt", "fields": {}, "validation": None}}
    }
    vectors = lm.embed(torch.tensor([5, 6])).float()
    prompt = SoftPrompt(vectors, lm.fingerprint, "{soft:2}{text}", name="two", notes=notes)
    save_prompt(prompt, tmp_path / "two")
    arguments = [
        "evaluate",
        "--prompt",
        str(tmp_path / "two"),
        "--judge-rows",
        "4",
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    assert main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["data"]["source"] == "builtin:roles"
    assert first["data"]["split"] == "test"
    assert main(arguments) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["reused"] == 4
    assert again["metrics"] == first["metrics"]


LABELLED_ROWS = [dict(one.fields) for one in ROWS]
NLL = JudgeSettings(metrics=["nll"])


@pytest.mark.parametrize(
    "template", ["Tweet: {text} Complaint? {label}", "{soft}Tweet: {text} Complaint? {label}", "numbered"]
)
def test_a_prompt_is_judged_at_its_own_length_however_its_template_writes_the_slot(
    lm: FrozenLM, template: str
) -> None:
    """A prompt of real embeddings loses what its words lose as a text in front; none of them has the default length."""
    words = "Classify the text.\n"
    prompt = of_words(lm, words, str(LABELLED), "label")
    assert prompt.length != 20
    if template != "numbered":
        prompt = replace(prompt, template=template)
    ours = evaluate(prompt, LABELLED_ROWS, base=lm, settings=NLL, progress=False)
    text = evaluate(
        TextPrompt(words),
        LABELLED_ROWS,
        base=lm,
        template="Tweet: {text} Complaint? {label}",
        target="label",
        settings=NLL,
        progress=False,
    )
    assert len(ours.rows) == len(ROWS)
    for one, other in zip(ours.rows, text.rows, strict=True):
        assert one.nll == pytest.approx(other.nll, rel=1e-4)


def test_a_prompt_without_a_template_stands_before_the_text(lm: FrozenLM) -> None:
    """As PEFT saves prompts: vectors, and nothing about where they stand."""
    bare = replace(of_words(lm, "act as", str(RUNNING), None), template="")
    rows = [one.fields["text"] for one in ROWS]
    ours = evaluate(bare, rows, base=lm, settings=NLL, progress=False)
    text = evaluate(TextPrompt("act as"), rows, base=lm, settings=NLL, progress=False)
    assert [row.nll for row in ours.rows] == pytest.approx([row.nll for row in text.rows], rel=1e-4)


def test_rows_are_judged_alike_from_a_list_a_file_splits_and_a_task(lm: FrozenLM, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LABELLED_ROWS))
    prompt = of_words(lm, "Classify the text.\n", str(LABELLED), "label")
    splits = Splits((), test=tuple(ROWS))
    task = Task(Template.parse(prompt.template, target="label"), splits, lm.tokenizer, None, "error", "auto")
    for data in (LABELLED_ROWS, tmp_path / "rows.jsonl", str(tmp_path / "rows.jsonl"), splits, task):
        found = evaluate(prompt, data, base=lm, settings=NLL, progress=False)
        losses_now = [row.nll for row in found.rows]
        assert losses_now == pytest.approx([row.nll for row in losses(lm, prompt, task.template)], rel=1e-6)


def test_the_ending_that_a_prompt_learned_is_the_ending_it_is_judged_by(lm: FrozenLM) -> None:
    prompt = of_words(lm, "Classify the text.\n", str(LABELLED), "label")
    learned = {
        "recipe": {"data": {"source": "x", "end": "never", "max_length": 60, "field": "of another version"}}
    }
    with_end = evaluate(prompt, LABELLED_ROWS, base=lm, settings=NLL, progress=False)
    without = evaluate(replace(prompt, notes=learned), LABELLED_ROWS, base=lm, settings=NLL, progress=False)
    assert [row.tokens for row in with_end.rows] == [row.tokens + 1 for row in without.rows]


def test_rows_that_do_not_fit_the_base_are_refused_before_any_is_judged_or_left_out_where_asked(
    lm: FrozenLM,
) -> None:
    prompt = of_words(lm, "Classify the text.\n", str(LABELLED), "label")
    long = {"text": "my order never came " * 200, "label": "complaint"}
    with pytest.raises(DataError, match=r"row 1 .* positions with the prompt"):
        evaluate(
            prompt,
            [LABELLED_ROWS[0], long],
            base=lm,
            settings=NLL,
            progress=lambda done, of: pytest.fail("judged"),
        )
    dropping = JudgedData(on_overflow="drop")
    found = evaluate(
        prompt, [LABELLED_ROWS[0], long], base=lm, settings=NLL, reading=dropping, progress=False
    )
    assert len(found.rows) == 1
    assert found.about["left_out"] == 1
    with pytest.raises(DataError, match="All 1 train rows"):
        evaluate(prompt, [long], base=lm, settings=NLL, reading=dropping, progress=False)


@pytest.mark.parametrize(
    "settings",
    [
        JudgeSettings(metrics=["accuracy"]),
        JudgeSettings(metrics=["accuracy"], answers="rank", labels=["complaint", "no complaint"]),
        NLL,
    ],
)
def test_a_prompt_that_overflows_the_base_is_refused_and_not_judged_as_wrong(
    settings: JudgeSettings,
) -> None:
    lm = FrozenLM.wrap(
        tiny_model("GPT-2"), tiny_tokenizer()
    )  # a layer norm of numbers this large is not finite
    prompt = of_words(lm, "Classify the text.\n", str(LABELLED), "label")
    broken = replace(prompt, embeddings_PD=torch.full_like(prompt.embeddings_PD, 3e38))
    with pytest.raises(NotFinite):
        evaluate(broken, LABELLED_ROWS, base=lm, settings=settings, progress=False)


def test_every_metric_can_be_asked_for_and_a_result_shows_its_figures(lm: FrozenLM) -> None:
    assert set(get_args(MetricName)) == set(METRICS)
    found = evaluate(None, LABELLED_ROWS, base=lm, template=str(LABELLED), target="label", progress=False)
    assert repr(found).startswith("Evaluation('base': accuracy=0.000")
    assert "tensor" not in repr(found)
    assert "<td>accuracy</td>" in found._repr_html_()
    assert json.dumps(found.to_record())


LOSSY_LABELS = ("Complaint", "ＮＯ　ＣＯＭＰＬＡＩＮＴ", "Réclamation")


def without_case_width_and_accents(text: str) -> str:
    """What Unicode's own tables leave of a text; the tokenizer below has the same rules from `tokenizers`."""
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter)).lower()


@pytest.fixture(scope="module")
def lossy_lm() -> FrozenLM:
    backend = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    return FrozenLM.wrap(tiny_model("Llama"), tokenizer)


@pytest.mark.parametrize("spoken", [without_case_width_and_accents, str.strip])
def test_a_label_that_the_tokenizer_alters_is_judged_in_its_altered_form(
    lossy_lm: FrozenLM, monkeypatch: pytest.MonkeyPatch, spoken: Callable[[str], str]
) -> None:
    """A base with this tokenizer can say the altered form alone: that is right, and the original is not."""
    data = [{"text": "thank you", "label": label} for label in LOSSY_LABELS]

    def answering(*arguments: object, **settings: object) -> Callable[[Sequence[Example]], list[Answer]]:
        return lambda examples: [Answer(text=spoken(example.fields["label"])) for example in examples]

    monkeypatch.setattr(judge, "predictor", answering)
    result = evaluate(
        None,
        data,
        base=lossy_lm,
        template=str(LABELLED),
        target="label",
        settings=JudgeSettings(metrics=["accuracy", "exact_match", "macro_f1"]),
        progress=False,
    )
    altered = [without_case_width_and_accents(label) for label in LOSSY_LABELS]
    assert [row.wanted for row in result.rows] == altered
    expected = 1.0 if spoken is without_case_width_and_accents else 0.0
    assert [estimate.value for estimate in result.estimates.values()] == [expected] * 3
    assert result.confusion is not None
    assert set(result.confusion.labels) == set(altered)


def test_a_ranked_label_is_said_in_the_form_that_it_is_judged_in(lossy_lm: FrozenLM) -> None:
    data = [{"text": text, "label": label} for text, label in zip("abc", LOSSY_LABELS, strict=True)]
    settings = JudgeSettings(metrics=["accuracy"], answers="rank")
    result = evaluate(
        None,
        data,
        base=lossy_lm,
        template=str(LABELLED),
        target="label",
        settings=settings,
        progress=False,
    )
    right = 0
    for row, label in zip(result.rows, LOSSY_LABELS, strict=True):
        assert row.scores is not None
        assert set(row.scores) == set(LOSSY_LABELS)
        likeliest = max(row.scores, key=row.scores.__getitem__)
        assert row.answer == without_case_width_and_accents(likeliest)
        right += likeliest == label
    assert [row.wanted for row in result.rows] == [without_case_width_and_accents(x) for x in LOSSY_LABELS]
    assert result.estimates["accuracy"].value == pytest.approx(right / 3)
