"""lm-evaluation-harness runs its tasks under a soft prompt, and finds what our own evaluate finds."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example
from softprompt.data.template import Template
from softprompt.evaluation.evaluate import judge_rows
from softprompt.evaluation.metric import metrics_named
from softprompt.evaluation.predictor import predictor
from softprompt.evaluation.settings import JudgeSettings
from softprompt.inference.compiled import compile_prompt
from softprompt.prompt.soft_prompt import SoftPrompt

lm_eval = pytest.importorskip(
    "lm_eval", reason="needs lm-evaluation-harness: pip install 'softprompt[lmeval]'"
)
pytestmark = pytest.mark.filterwarnings("ignore")  # of lm_eval and what it imports

ROWS = 10


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return FrozenLM.load("builtin", dtype="float32")


@pytest.fixture(scope="module")
def prompt(lm: FrozenLM) -> SoftPrompt:
    """Vectors of real words, so that the prompt changes answers without being tuned."""
    ids = lm.tokenizer("Questions to a bank and what they are about: ")["input_ids"]
    vectors = lm.embed(torch.tensor(ids)).float()
    return SoftPrompt(
        vectors,
        lm.fingerprint,
        f"{{soft:{len(ids)}}}Question: {{text}} Topic: {{label}}",
        "label",
        name="words",
    )


def task(folder: Path, rows: list[dict[str, str]], choices: list[str], kind: str) -> Path:
    """A task of the harness: a csv file and a YAML file."""
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    shared = f"""
dataset_path: csv
dataset_kwargs: {{data_files: {{test: {json.dumps(str(folder / "rows.csv"))}}}}}
test_split: test
doc_to_text: "Question: {{{{text}}}} Topic:"
doc_to_target: label
output_type: {kind}
"""
    if kind == "multiple_choice":
        shared += (
            f"task: local_choice\ndoc_to_choice: {json.dumps(choices)}\nmetric_list: [{{metric: acc}}]\n"
        )
    else:
        shared += (
            'task: local_generate\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}\n'
            "metric_list: [{metric: exact_match}]\n"
        )
    path = folder / f"{kind}.yaml"
    path.write_text(shared)
    return path


@pytest.mark.parametrize("kind", ["multiple_choice", "generate_until"])
def test_the_harness_and_our_own_evaluate_agree_on_banking77(
    lm: FrozenLM, prompt: SoftPrompt, shared_data: Path, tmp_path: Path, kind: str
) -> None:
    from lm_eval.tasks import TaskManager

    from softprompt.evaluation.lm_eval_model import SoftPromptLM

    with (shared_data / "banking77" / "test.csv").open(newline="") as file:
        found = list(csv.DictReader(file))[:: 3080 // ROWS][:ROWS]
    rows = [{"text": one["text"], "label": one["category"].replace("_", " ")} for one in found]
    choices = sorted({one["label"] for one in rows})
    path = task(tmp_path, rows, choices, kind)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs: dict[str, Any] = lm_eval.simple_evaluate(
        model=SoftPromptLM(prompt=prompt, lm=lm),
        tasks=[
            path.stem.replace("multiple_choice", "local_choice").replace("generate_until", "local_generate")
        ],
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
    )
    (figures,) = theirs["results"].values()
    (samples,) = theirs["samples"].values()
    layout = Template.parse(prompt.template, target="label")
    examples = [Example(row, row=place) for place, row in enumerate(rows)]
    metrics = metrics_named(["accuracy"])
    ranked = kind == "multiple_choice"
    asked = JudgeSettings(
        answers="rank" if ranked else "generate",
        labels=choices if ranked else [],
        max_new_tokens=6,
        stop=["\n"],
    )
    compiled = compile_prompt(lm, prompt)
    ours = judge_rows(predictor(lm, compiled, layout, metrics, asked, end="never"), examples, metrics, layout)
    by_text = {one["doc"]["text"]: one for one in samples}
    if kind == "multiple_choice":
        assert figures["acc,none"] == pytest.approx(ours.estimates["accuracy"].value)
        for row, judged in zip(rows, ours.rows, strict=True):
            assert judged.scores is not None
            told = [float(answer[0]) for answer in by_text[row["text"]]["filtered_resps"]]
            assert told == pytest.approx([judged.scores[choice] for choice in choices], rel=1e-4)
    else:
        for row, judged in zip(rows, ours.rows, strict=True):
            assert by_text[row["text"]]["filtered_resps"] == [judged.answer]


def test_rolling_text_is_scored_whole_under_a_prompt(lm: FrozenLM, prompt: SoftPrompt) -> None:
    from lm_eval.api.instance import Instance

    from softprompt.evaluation.lm_eval_model import SoftPromptLM

    text = "The bank is closed today."
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    (found,) = SoftPromptLM(prompt=prompt, lm=lm).loglikelihood_rolling([request])
    words = "Questions to a bank and what they are about: "
    ids = torch.tensor([lm.tokenizer(words)["input_ids"] + lm.tokenizer(text)["input_ids"]])
    first = len(lm.tokenizer(words)["input_ids"])
    with torch.no_grad():
        logits = lm.model(input_ids=ids).logits[0].log_softmax(-1)
    wanted = logits[first - 1 : -1].gather(1, ids[0, first:, None]).sum().item()
    assert found == pytest.approx(wanted, rel=1e-4)
