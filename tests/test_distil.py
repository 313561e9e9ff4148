"""Distillation end to end on small models: the student comes near the teacher, resumes to the bit, and refuses nonsense."""

from __future__ import annotations

import math
import random
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.nll import Head
from softprompt.cli.app import main
from softprompt.data.batch import collate
from softprompt.data.example import Example
from softprompt.data.template import Template
from softprompt.errors import BaseError, DataError, RecipeError
from softprompt.inference.generate import generate
from softprompt.inference.settings import DecodeSettings
from softprompt.loss.divergence import DivergenceLoss
from softprompt.loss.fast import FastLoss
from softprompt.loss.soft_targets import SoftTargets, soft_cross_entropy
from softprompt.progress.events import Event, Note, Stepped
from softprompt.store.artifact import load_prompt
from softprompt.tuning import nearness as nearness_module
from softprompt.tuning import questions
from softprompt.tuning.distil import distil
from softprompt.tuning.distil_settings import DistilSettings
from softprompt.tuning.distil_source import few_shot_text
from softprompt.tuning.lessons import lessons_of
from softprompt.tuning.questions import first_question, parts_of
from softprompt.tuning.recipe import TuneSettings
from softprompt.tuning.teacher import Teachers, teacher_of
from tiny_models import tiny_model, tiny_tokenizer

CONTEXT = "The quick brown fox jumps over the lazy dog. I want you to act as a logistician. " * 2
QUESTIONS = ["Tweet: my order", "never came", "thank you", "for the quick help", "classify the text", "answer with", "the label alone", "one of the following", "nobody answers", "act as a fox", "a lazy dog", "complaint"]  # fmt: skip


def lm_of(architecture: str = "Llama") -> FrozenLM:
    return FrozenLM.wrap(tiny_model(architecture), tiny_tokenizer(), "tiny")


def settings(folder: Path, **distil_settings: Any) -> DistilSettings:
    (folder / "context.txt").write_text(CONTEXT, encoding="utf-8")
    (folder / "q.csv").write_text("text\n" + "\n".join(QUESTIONS) + "\n", encoding="utf-8")
    tree: dict[str, Any] = {
        "out": str(folder / "out"),
        "context": {"document": str(folder / "context.txt")},
        "data": {"source": str(folder / "q.csv"), "column": "text", "validation": 4},
        "distil": {"length": 8, "answer_tokens": 6, "answers": 2, **distil_settings},
        "tune": {"epochs": 4, "batch_size": 4, "checkpoint_steps": 2},
    }
    return DistilSettings(**tree)


@pytest.mark.parametrize("architecture", ["Llama", "BLOOM (ALiBi)", "GPT-2"])
def test_the_short_prompt_comes_nearer_to_the_context_than_its_start_and_the_bare_base(
    architecture: str, tmp_path: Path
) -> None:
    result = distil(settings(tmp_path), lm=lm_of(architecture))
    assert result.kl < result.kl_start
    # Where distances cannot be kept (learned positions, ALiBi), eight positions hold less of the context.
    assert result.kl < (0.5 if architecture == "Llama" else 0.8) * result.kl_base
    assert result.context_positions > 8 * 4
    loaded = load_prompt(tmp_path / "out", base=lm_of(architecture).fingerprint)
    assert (loaded.kind, loaded.length) == ("deep", 8)
    assert all(torch.equal(a, b) for a, b in zip(loaded.plain, result.prompt.plain, strict=True))


def test_the_first_position_of_the_context_stays_as_it_was(tmp_path: Path) -> None:
    lm = lm_of()
    result = distil(settings(tmp_path, init="first"), lm=lm)
    teacher = teacher_of(lm, CONTEXT, Template.parse("{text}\n"))
    for layer, own in zip(result.prompt.plain[0], teacher.compiled.state.keys, strict=True):
        torch.testing.assert_close(layer[0], own[:, 0])


def test_a_soft_prompt_is_learned_where_it_is_asked_for(tmp_path: Path) -> None:
    notes: list[str] = []
    result = distil(
        settings(tmp_path, kind="soft"),
        lm=lm_of(),
        on_event=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert result.prompt.kind == "soft"
    assert result.kl < result.kl_start
    assert any("hold far less of a long text" in note for note in notes)


def test_the_loss_is_the_divergence_that_the_whole_vocabulary_gives(tmp_path: Path) -> None:
    """Teacher and student through transformers' own model, row by row, against the loss that is learned by."""
    lm = lm_of()
    teacher = teacher_of(lm, CONTEXT, Template.parse("{text}\n"))
    questions = [Example({"text": text}) for text in QUESTIONS[:3]]
    answers = [own[0] for own in teacher.answers(questions, DecodeSettings(max_new_tokens=5))]
    targets = teacher.targets([(q, a.ids) for q, a in zip(questions, answers, strict=True)], None)
    rows = [teacher.student_row(q, a.ids, n) for n, (q, a) in enumerate(zip(questions, answers, strict=True))]
    loss = DivergenceLoss(FastLoss(lm), dict(enumerate(targets)))
    found = torch.split(loss(collate(rows)), [len(answer.ids) for answer in answers])
    for question, answer, ours in zip(questions, answers, found, strict=True):
        both = []
        for text in (CONTEXT, ""):  # one text, as a person would write it
            ids = lm.tokenizer(f"{text}{question.fields['text']}\n")["input_ids"]
            with torch.no_grad():
                logits_SV = lm.model(input_ids=torch.tensor([[*ids, *answer.ids]])).logits[0]
            both.append(logits_SV.log_softmax(-1)[-len(answer.ids) - 1 : -1])
        theirs = (both[0].exp() * (both[0] - both[1])).sum(-1)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_few_of_the_teachers_tokens_give_nearly_the_divergence_of_all_of_them_and_never_more() -> None:
    """Tokens that are counted together can only hide a difference (the data-processing inequality)."""
    drawn = torch.Generator().manual_seed(0)
    teacher_NV, hidden_ND = (
        torch.randn(40, 300, generator=drawn) * 4,
        torch.randn(40, 300, generator=drawn) * 4,
    )
    hidden_ND = teacher_NV + 0.1 * hidden_ND
    divergences = []
    for k in (20, None):
        targets = SoftTargets.of(teacher_NV, k)
        divergences.append(soft_cross_entropy(hidden_ND, targets, Head(torch.eye(300))) - targets.entropy_N)
    few_N, all_N = divergences
    assert bool((few_N <= all_N + 1e-5).all())
    assert float(few_N.mean()) > 0.9 * float(all_N.mean())


@pytest.mark.parametrize(("killed_after", "on_policy"), [(3, 0), (3, 1), (9, 1)])
def test_a_killed_distillation_resumes_to_the_same_bits(
    tmp_path: Path, on_policy: int, killed_after: int
) -> None:
    """With answers that are drawn again in the middle, before and after that too."""
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = distil(settings(tmp_path / "whole", on_policy=on_policy), lm=lm_of())
    steps = 0

    def kill(event: Event) -> None:
        nonlocal steps
        steps += isinstance(event, Stepped)
        if steps == killed_after:
            raise SystemExit

    cut = settings(tmp_path / "cut", on_policy=on_policy)
    with pytest.raises(SystemExit):
        distil(cut, lm=lm_of(), on_event=kill)
    resumed = distil(cut, lm=lm_of(), resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.prompt.plain, resumed.prompt.plain, strict=True))


def test_answers_of_the_short_prompt_itself_are_learned_from_with_the_teachers_probabilities(
    tmp_path: Path,
) -> None:
    lm = lm_of()
    given = settings(tmp_path, temperature=0.0)
    prompt = distil(given, lm=lm).prompt
    teacher = Teachers((teacher_of(lm, CONTEXT, Template.parse("{text}\n")),))
    questions = [Example({"text": text}, row=n) for n, text in enumerate(QUESTIONS[:4])]
    lessons = lessons_of(teacher, questions, given, student=prompt, number=1)
    own = [text.token_ids for text in generate(lm, questions, prompt, DecodeSettings(max_new_tokens=6))]
    assert [lesson.answer.ids for lesson in lessons] == own
    for lesson in lessons:
        ids = lm.tokenizer(f"{CONTEXT}{lesson.question.fields['text']}\n")["input_ids"]
        with torch.no_grad():
            logits_SV = lm.model(input_ids=torch.tensor([[*ids, *lesson.answer.ids]])).logits[0]
        theirs = logits_SV.softmax(-1)[len(ids) - 1 : -1].gather(1, lesson.targets.ids_Nk)
        torch.testing.assert_close(lesson.targets.probabilities_Nk, theirs, atol=1e-5, rtol=1e-3)


def test_what_cannot_be_distilled_is_refused_in_one_line(tmp_path: Path) -> None:
    given = settings(tmp_path)
    (tmp_path / "context.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(DataError, match="The context is empty"):
        distil(given, lm=lm_of())
    (tmp_path / "context.txt").write_text("hi", encoding="utf-8")
    with pytest.raises(DataError, match=r"which fit into 8 virtual tokens"):
        distil(given, lm=lm_of())
    with pytest.raises(DataError, match=r"there is no such file"):
        distil(
            given.model_copy(update={"context": given.context.model_copy(update={"document": "nowhere.md"})}),
            lm=lm_of(),
        )
    exact = settings(tmp_path, exact=True)
    with pytest.raises(BaseError, match="no rotary positions"):
        distil(exact, lm=lm_of("GPT-2"))
    assert not (tmp_path / "out" / "softprompt.json").exists()


def test_no_questions_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(tmp_path)
    (tmp_path / "q.csv").write_text("text\n", encoding="utf-8")
    with pytest.raises(DataError) as empty:
        distil(given, lm=lm_of())
    (tmp_path / "q.csv").write_text("text\nalone\n", encoding="utf-8")
    with pytest.raises(DataError) as too_few:
        distil(given, lm=lm_of())
    monkeypatch.setattr(questions, "_written", lambda lm, wishes, seed: ["..." for _ in wishes])
    own = given.model_copy(update={"data": given.data.model_copy(update={"source": None})})
    with pytest.raises(DataError, match=r"wrote no question about the text \(\d+ were empty\)"):
        distil(own, lm=lm_of())
    assert "q.csv" in str(empty.value)
    assert "data.validation takes 4 rows" in str(too_few.value)
    assert "\n" not in f"{empty.value}{too_few.value}"
    assert not (tmp_path / "out" / "softprompt.json").exists()


@pytest.mark.parametrize("architecture", ["Llama", "GPT-2"])
def test_a_document_longer_than_the_base_reads_is_cut_into_parts(architecture: str, tmp_path: Path) -> None:
    """128 positions: three parts, each with a teacher of its own and its share of the short prompt. Learned positions end
    there: nothing may be read beyond them."""
    given = settings(tmp_path)
    paragraphs = [f"{CONTEXT[:80]} {number}" for number in ("one", "two", "three", "four")]
    (tmp_path / "context.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    notes: list[str] = []
    result = distil(
        given,
        lm=lm_of(architecture),
        on_event=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert any("cut into" in note for note in notes)
    assert result.context_positions > 128 - 6
    assert result.prompt.length == 8
    assert result.kl < result.kl_start
    assert result.kl < result.kl_base


def test_the_epochs_do_not_depend_on_which_other_setting_is_given() -> None:
    given = {"context": {"document": "handbook.md"}}
    epochs = {DistilSettings(**given, **more).tune.epochs for more in ({}, {"tune": {"seed": 1}})}
    assert epochs == {TuneSettings().epochs}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({}, "wanted one long text"),
        ({"context": {"document": "a", "instruction": "b"}}, "wanted one long text"),
        ({"context": {"shots": 4}}, "shots needs labelled rows"),
        ({"context": {"instruction": "be kind"}}, "needs texts that it is applied to"),
        ({"context": {"document": "a"}, "distil": {"gold": 0.5}}, "gold needs right answers"),
        (
            {"context": {"document": "a"}, "data": {"target": "b"}, "distil": {"gold": 0.5, "on_policy": 1}},
            "from right answers, and on_policy",
        ),
        (
            {"context": {"document": "a"}, "distil": {"kind": "soft", "init": "first"}},
            "cannot hold the keys and values of --init first",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        DistilSettings(**tree)


def test_agreement_is_given_where_the_long_text_is_sure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy answers and the margins along them by transformers' own model, of the context and of the short prompt."""
    lm = lm_of()
    questions = [Example({"text": text}, row=n) for n, text in enumerate(QUESTIONS)]
    prompt = distil(settings(tmp_path), lm=lm).prompt

    def greedy(ids: list[int], plain: tuple[torch.Tensor, ...] | None) -> tuple[list[int], float]:
        answer, margins = list[int](), list[float]()
        for _ in range(6):
            cache = None
            if plain is not None:
                layers = [
                    tuple(each.transpose(0, 1)[None] for each in layer) for layer in zip(*plain, strict=True)
                ]
                cache = DynamicCache(layers)
            with torch.no_grad():
                logits_V = lm.model(torch.tensor([[*ids, *answer]]), past_key_values=cache).logits[0, -1]
            top = logits_V.softmax(0).topk(2)
            answer.append(int(top.indices[0]))
            margins.append(float(top.values[0] - top.values[1]))
            if answer[-1] == lm.tokenizer.eos_token_id:
                break
        return answer, min(margins)

    def ids(text: str) -> list[int]:
        return list(lm.tokenizer(text)["input_ids"])

    wanted = [greedy(ids(f"{CONTEXT}{text}\n"), None) for text in QUESTIONS]
    same = [
        greedy(ids(f"{text}\n"), prompt.plain)[0] == answer
        for text, (answer, _) in zip(QUESTIONS, wanted, strict=True)
    ]
    margin = sorted(margin for _, margin in wanted)[len(wanted) // 2]
    sure = [agrees for agrees, (_, own) in zip(same, wanted, strict=True) if own >= margin]
    monkeypatch.setattr(nearness_module, "SURE_MARGIN", margin - 1e-6)
    teacher = Teachers((teacher_of(lm, CONTEXT, Template.parse("{text}\n")),))
    near = nearness_module.nearness(teacher, prompt, questions, 6)
    assert near.judged == len(QUESTIONS)
    assert near.agreement == pytest.approx(sum(same) / len(same))
    assert near.sure == pytest.approx(len(sure) / len(same))
    assert near.agreement_sure == pytest.approx(sum(sure) / len(sure))
    assert math.isnan(near.right_prompt)


def test_right_answers_that_count_are_learned_beside_the_teachers(tmp_path: Path) -> None:
    """The loss of the rows' own labels, which the teacher hardly ever gives; figures of KL stay those of the long text."""
    losses, kl_base = [], []
    labels = [("fox", "dog")[n % 2] for n in range(len(QUESTIONS))]
    rows = "".join(f"{text},{label}\n" for text, label in zip(QUESTIONS, labels, strict=True))
    for gold in (0.01, 0.7):
        folder = tmp_path / str(gold)
        folder.mkdir()
        tree = settings(folder).model_dump(mode="json")
        (folder / "q.csv").write_text(f"text,label\n{rows}", encoding="utf-8")
        tree["data"] |= {"column": None, "target": "label"}
        tree["distil"]["gold"], tree["tune"]["epochs"] = gold, 12
        lm = lm_of()
        result = distil(DistilSettings(**tree), lm=lm)
        template = Template.parse("{text}\nlabel: {label}", target="label")
        teacher = teacher_of(lm, CONTEXT, template)
        examples = [
            Example({"text": text, "label": label}, row=n)
            for n, (text, label) in enumerate(zip(QUESTIONS, labels, strict=True))
        ]
        encoded = [teacher.student_row(row, teacher.gold(row).ids, row.row) for row in examples]
        losses.append(float(lm.token_nll(collate(encoded), result.prompt.plain).mean()))
        kl_base.append(result.kl_base)
    assert losses[1] < 0.7 * losses[0]
    assert kl_base[0] == pytest.approx(kl_base[1])


def test_questions_are_of_five_kinds_and_empty_and_repeated_ones_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds = iter(
        [
            ["What is a fox?", "", "1. what is a fox?", "Who is the dog?", "..."],
            ["Who is the dog?", "Where does it jump?", "How lazy is it?"],
            ["Why is it quick today?"],
        ]
    )
    asked: list[list[questions.Wish]] = []

    def written(lm: FrozenLM, wishes: list[questions.Wish], seed: int) -> list[str]:
        asked.append(wishes)
        return next(rounds)

    monkeypatch.setattr(questions, "_written", written)
    found = questions.write_questions(lm_of(), CONTEXT, 5)
    assert [row.fields["text"] for row in found.questions] == [
        "What is a fox?", "Who is the dog?", "Where does it jump?", "How lazy is it?", "Why is it quick today?",
    ]  # fmt: skip
    assert (found.empty, found.repeated) == (2, 2)
    assert {wish.task for wish in asked[0]} == {kind.task for kind in questions.KINDS.values()}
    assert len(questions.KINDS) == 5


def test_every_part_and_opening_is_asked_for_once_before_any_is_asked_for_again() -> None:
    parts = ["one", "two", "three"]
    wishes = list(islice(questions._by_turns(parts, random.Random(0)), 5 * 3 * 4))
    for kind in questions.KINDS.values():
        own = [(wish.part, wish.opening) for wish in wishes if wish.task == kind.task]
        assert len(own) == 12
        assert set(own) <= set(product(parts, kind.openings))
        assert len(set(own)) == 12


def test_questions_are_what_the_base_writes_behind_the_whole_text_of_each_wish() -> None:
    """Against generation from the whole text, which reads the part again for every row; a wish that comes twice is drawn twice."""
    lm = lm_of()
    wishes = [questions.Wish("The quick brown fox", task, opening) for task, opening in (("Ask.", "What"), ("Ask me.", "Who"))]  # fmt: skip
    wishes += [questions.Wish("I want you to act as a dog", "Ask.", "What"), wishes[0]]
    settings = DecodeSettings(
        max_new_tokens=questions.QUESTION_TOKENS, temperature=0.8, min_p=0.05, seed=3, stop=("\n",), n=2
    )
    texts = [f"{wish.part}\n\n{wish.task}\n{wish.opening}" for wish in wishes[:3]]
    drawn = [text.text for text in generate(lm, texts, None, settings)]
    wanted = [f"{wish.opening}{drawn[n]}" for wish, n in zip(wishes, (0, 2, 4, 1), strict=True)]
    assert questions._written(lm, wishes, 3) == wanted
    assert wanted[0] != wanted[3]


def own_questions(folder: Path) -> DistilSettings:
    given = settings(folder)
    return given.model_copy(update={"data": given.data.model_copy(update={"source": None, "written": 8})})


def test_a_context_that_cannot_be_distilled_is_refused_before_questions_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = own_questions(tmp_path)

    def written(*asked: Any) -> list[str]:
        raise AssertionError("the base was asked for questions")

    monkeypatch.setattr(questions, "_written", written)
    for text, message in (("", "The context is empty"), ("hi", "fit into 8 virtual tokens")):
        (tmp_path / "context.txt").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            distil(given, lm=lm_of())


def test_a_base_without_a_chat_template_learns_from_questions_that_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        questions, "_written", lambda lm, wishes, seed: [f"{text} please?" for text in QUESTIONS]
    )
    lm = lm_of()
    assert lm.tokenizer.chat_template is None
    result = distil(own_questions(tmp_path), lm=lm)
    assert result.kl < result.kl_start
    assert result.prompt.template == "{soft:8}{text}\n"


def test_a_few_shot_block_shows_every_answer_about_equally_often() -> None:
    layout = Template.parse("{text} is {label}\n\n", target="label")
    rows = [Example({"text": f"t{n}", "label": "ab"[n % 2]}) for n in range(20)]
    block = few_shot_text(rows, layout, 6, seed=0)
    assert (block.count(" is a\n\n"), block.count(" is b\n\n")) == (3, 3)
    assert block == few_shot_text(rows, layout, 6, seed=0)
    assert block != few_shot_text(rows, layout, 6, seed=1)


def test_documents_are_parted_at_paragraphs_and_questions_cleaned() -> None:
    assert parts_of("one\n\ntwo\n\nthree", 9) == ["one\n\ntwo", "three"]
    assert "".join(parts_of("word " * 100, 50)).replace(" ", "") == "word" * 100
    assert first_question('\n 1. "What is the price?"\nnext') == "What is the price?"
    assert first_question("ok\n...") == ""


def test_a_few_shot_block_is_distilled_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = "distil --base builtin --shots 6 --data builtin:messages --target label --limit 30 --validation 6 --virtual-tokens 8 --answer-tokens 4 --epochs 1 --set data.test=16 --out short --json"  # fmt: skip
    assert main(command.split()) == 0
    import json

    record = json.loads(capsys.readouterr().out)
    assert record["kl"] <= record["kl_start"] < record["kl_base"]
    assert record["virtual_tokens"] == 8
    assert 0 <= record["gold_prompt"] <= 1
    assert main(["generate", "--prompt", "short", "Where is my parcel?"]) == 0
