"""The peer suite: PEFT's ways of learning at searched rates, full fine-tuning, and softprompt by default, on the same rows.

    python benchmarks/peer.py --base bases/smollm2 --search-steps 30 --seeds 0 1 2 --workers 8 --runs benchmarks/peer.jsonl
    python benchmarks/peer.py --quick --base builtin --sets snips --steps 60 --runs runs/peer.jsonl
    python benchmarks/peer.py --kept --search-steps 30 --seeds 0 1 2 --runs benchmarks/peer.jsonl --page docs/learning-measured.md

Every arm sees the same batches for the same steps and keeps its best validated step. PEFT's arms and full fine-tuning take
AdamW with linear decay, a warm-up of 6 % and a gradient norm of at most 1, at every rate that is listed for them; validation
loss chooses the rate. With --search-steps, each rate is tried for so many steps of the first seed, and the best alone goes all the way. softprompt's arms take nothing but their kind. Test rows are judged once for each run, by softprompt's
evaluate: loss, and what the set is about (exact labels, BLEU against all references). `gain` is the base's test loss less an arm's, its
share that of full fine-tuning's gain, and bytes are those that are kept for the task, in float32.

--runs holds a line a run, and a run that is there is not repeated, so that several machines and days can add to it; --kept runs nothing and
sums up what is there. --workers N makes N runs at a time, each in a process of its own, seed by seed, so that whatever there is time
for can be compared: on a GPU, one run of a small base leaves most of it idle.

--peft-checkout PATH judges prompt arms on sets of labels a second time by the `evaluate()` of PEFT's method_comparison, which is read
from a checkout of PEFT, for the first seed: batches padded on the left, generated through PEFT's model (softprompt's prompts through their export).
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
from torch import Tensor

from machine import describe
from page_table import put_table
from quality_vs_peft import DATA, TASKS, Task, plain
from softprompt.base.frozen_lm import FrozenLM
from softprompt.comparison.weights import learn_weights, served
from softprompt.data.batch import Batch, collate
from softprompt.data.example import Example, Splits
from softprompt.evaluation.evaluate import judge_rows
from softprompt.evaluation.metric import METRICS
from softprompt.evaluation.predictor import predictor, settled
from softprompt.evaluation.settings import JudgeSettings
from softprompt.inference.compiled import CompiledPrompt, compile_prompt
from softprompt.prompt.soft_prompt import prompt_of
from softprompt.store.artifact import load_prompt, prompt_bytes, save_prompt
from softprompt.tuning.loop import tune
from softprompt.tuning.plan import Plan
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.settle import make_plan

LENGTH = 20
JUDGED_TOGETHER = 64  # rows
GSM8K_CHARACTERS = 400  # at most 222 tokens of SmolLM2
PROMPT_RATES, LORA_RATES = (0.005, 0.03, 0.3), (2e-4, 5e-4, 2e-3)
SIZES = (
    "batch_size",
    "positions",
    "validation_rows",
    "test_rows",
)  # settings of which all runs that are compared have the same
METRICS_OF = {"e2e_nlg": ["nll", "bleu"], "gsm8k": ["nll"]}  # all other sets: loss and exact labels


@dataclass(frozen=True)
class Arm:
    """One way of learning: where its prompt or weights come from, and the rates that are tried."""

    kind: str  # "ours", "prompt" (PEFT's, plain vectors or keys and values) or "weights"
    make: Callable[[FrozenLM, Plan, str], Any]  # for "ours": settings that differ from the default ones
    rates: Sequence[float] = ()


def peft_model(config: Callable[[Plan], peft.PeftConfig]) -> Callable[[FrozenLM, Plan, str], Any]:
    """PEFT's model around a copy of the base."""
    return lambda lm, plan, instruction: peft.get_peft_model(copy.deepcopy(lm.model), config(plan))


def text_start(lm: FrozenLM, plan: Plan, instruction: str) -> Any:
    """PEFT's prompt tuning from a text: it repeats or cuts the text to the length."""
    table = copy.deepcopy(lm.model)
    ids = lm.tokenizer(instruction, add_special_tokens=False)["input_ids"]
    model = peft.get_peft_model(table, vectors(plan))
    rows = torch.tensor([ids[n % len(ids)] for n in range(LENGTH)], device=lm.device)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(lm.embed(rows))
    return model


def prefix_of_text(lm: FrozenLM, plan: Plan, instruction: str) -> Any:
    """PEFT's prefix tuning from the keys and values of a text, repeated to the length."""
    model = peft.get_peft_model(copy.deepcopy(lm.model), prefix(plan))
    text = instruction
    while len(lm.tokenizer(text)["input_ids"]) < LENGTH:
        text += instruction
    peft.initialize_kv_prefix_from_text(
        model, lm.tokenizer, text=text, num_virtual_tokens=LENGTH, use_chat_template=False
    )
    return model


def frequent_targets(plan: Plan) -> list[int]:
    """The tokens that targets hold most often: what trainable tokens may change."""
    counts: Counter[int] = Counter()
    for row in plan.train.encoded:
        counts.update(token for token, trained in zip(row.ids, row.trained, strict=True) if trained)
    return sorted(token for token, _ in counts.most_common(LENGTH))


def vectors(plan: Plan, **more: Any) -> peft.PeftConfig:
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, **more)


def prefix(plan: Plan) -> peft.PeftConfig:
    return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)


def lora(rank: int) -> Callable[[Plan], peft.PeftConfig]:
    return lambda plan: peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def whole(lm: FrozenLM, plan: Plan, instruction: str) -> Any:
    return copy.deepcopy(lm.model).float().requires_grad_(True)


def longer(tokens: int) -> Callable[[FrozenLM, Plan, str], list[str]]:
    """Settings of a deep prompt of so many virtual tokens, with the same room for text."""
    return lambda lm, plan, instruction: [
        "prompt.kind=deep",
        f"prompt.length={tokens}",
        f"data.max_length={(plan.recipe.data.max_length or 0) - LENGTH + tokens}",
    ]


def before_the_answer(plan: Plan) -> list[str]:
    """Settings of a soft prompt that stands there."""
    return ["prompt.kind=soft", f"data.template={plan.template.with_slot(at_answer=True)}"]


ARMS: dict[str, Arm] = {
    "softprompt soft": Arm("ours", lambda lm, plan, instruction: ["prompt.kind=soft"]),
    "softprompt soft, before the answer": Arm("ours", lambda lm, plan, instruction: before_the_answer(plan)),
    "softprompt soft, from vocabulary": Arm(  # the default until it was scaled
        "ours", lambda lm, plan, instruction: ["prompt.kind=soft", "prompt.init=vocabulary"]
    ),
    "softprompt soft, before the answer, from vocabulary": Arm(
        "ours", lambda lm, plan, instruction: [*before_the_answer(plan), "prompt.init=vocabulary"]
    ),
    "softprompt deep": Arm("ours", lambda lm, plan, instruction: ["prompt.kind=deep"]),
    "softprompt deep, 64 tokens": Arm("ours", longer(64)),
    "softprompt deep, 256 tokens": Arm("ours", longer(256)),  # 30 % of LoRA 32's bytes on SmolLM2
    "prompt tuning, random": Arm("prompt", peft_model(vectors), PROMPT_RATES),
    "prompt tuning, sampled vocabulary": Arm(
        "prompt", peft_model(lambda plan: vectors(plan, prompt_tuning_init="SAMPLE_VOCAB")), PROMPT_RATES
    ),
    "prompt tuning, text": Arm("prompt", text_start, PROMPT_RATES),
    "p-tuning": Arm(
        "prompt",
        peft_model(
            lambda plan: peft.PromptEncoderConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, encoder_hidden_size=128
            )
        ),
        (0.001, 0.005, 0.03),
    ),
    "prefix": Arm("prompt", peft_model(prefix), PROMPT_RATES),
    "prefix of a text": Arm("prompt", prefix_of_text, PROMPT_RATES),
    "lora 8": Arm("weights", peft_model(lora(8)), LORA_RATES),
    "lora 32": Arm("weights", peft_model(lora(32)), LORA_RATES),
    "ia3": Arm("weights", peft_model(lambda plan: peft.IA3Config(task_type="CAUSAL_LM")), (5e-3,)),
    "trainable tokens": Arm(
        "weights",
        peft_model(lambda plan: peft.TrainableTokensConfig(token_indices=frequent_targets(plan))),
        (1e-3, 5e-3),
    ),
    "full": Arm("weights", whole, (2e-5, 1e-4)),
}
FORMER = ", from vocabulary"  # ends the names of arms that start as the default once did
QUICK = {"prompt tuning, random": (0.03,), "prefix": (0.03,), "lora 8": (2e-3,), "full": (1e-4,)}
PROMPT_TUNING = [name for name in ARMS if name.startswith(("prompt tuning", "p-tuning"))]
PREFIX = [name for name in ARMS if name.startswith("prefix")]


def gsm8k() -> Task:
    """Sums in words, and their worked answers; long ones are left out, so that an answer is never cut."""

    def read(split: str) -> list[Example]:
        lines = (DATA / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = enumerate(map(json.loads, lines))
        return [
            Example({"text": row["question"], "label": row["answer"]}, row=n)
            for n, row in rows
            if len(row["question"]) + len(row["answer"]) <= GSM8K_CHARACTERS
        ]

    train = read("train")
    splits = Splits(tuple(train[:-200]), tuple(train[-200:]), tuple(read("test")), "gsm8k")
    return Task(
        splits,
        "{soft}Question: {text} Answer: {label}",
        "label",
        "Questions in words, worked out step by step.\n",
    )


SETS: dict[str, Callable[[], Task]] = {
    **{name: TASKS[name] for name in ("banking77", "snips", "e2e_nlg", "messages")},
    "gsm8k": gsm8k,
}


KINDS = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}


def trec(folder: Path) -> Task:
    """Questions and what is asked for, of six kinds (Li and Roth 2002): train_5500.label and TREC_10.label, as their authors wrote them."""

    def read(name: str) -> list[Example]:
        lines = (folder / name).read_text(encoding="latin-1").splitlines()
        pairs = [line.split(" ", 1) for line in lines if line.strip()]
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
        return [
            Example(
                {"text": pairs[place][1].strip(), "label": KINDS[pairs[place][0].split(":")[0]]}, row=place
            )
            for place in order
        ]

    train = read("train_5500.label")
    splits = Splits(tuple(train[:-200]), tuple(train[-200:]), tuple(read("TREC_10.label")), "trec")
    return Task(
        splits, "{soft}Question: {text}\nType: {label}", "label", "Questions, each with what is asked for.\n"
    )


def peft_nll(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """Summed loss of the trained tokens through a whole model, and how many. PEFT's prompt tuning adds logits in front."""
    S = batch.ids_BS.shape[1]
    mask_BS = torch.arange(S, device=batch.ids_BS.device)[None] < batch.lengths_B[:, None]
    logits_BSV = model(input_ids=batch.ids_BS, attention_mask=mask_BS.long(), use_cache=False).logits[:, -S:]
    trained_BS = batch.trained_BS[:, 1:]
    nll = torch.nn.functional.cross_entropy(
        logits_BSV[:, :-1][trained_BS].float(), batch.ids_BS[:, 1:][trained_BS], reduction="sum"
    )
    return nll, int(trained_BS.sum())


def held_out_nll(model: Any, plan: Plan) -> float:
    """Loss on the rows that choose the best step."""
    rows = plan.held_out_base
    with torch.inference_mode():
        pieces = [
            peft_nll(model, collate(rows[first : first + plan.batch_size]).to(plan.lm.device))
            for first in range(0, len(rows), plan.batch_size)
        ]
    return sum(float(nll) for nll, _ in pieces) / sum(tokens for _, tokens in pieces)


def learned(lm: FrozenLM, task: Task, run: Run, given: Any, out: Path, judge: bool = True) -> dict[str, Any]:
    """Learns one arm at one rate and, if it is to be judged, judges it on the test rows."""
    arm, rate, seed = ARMS[run.arm], run.rate, run.seed
    settings = recipe(task, seed, given, out)
    splits = of_size(task.splits, given)
    plan = make_plan(settings, lm=lm, splits=splits)
    began = time.process_time()
    if arm.kind == "ours":
        settings = settings.changed(arm.make(lm, plan, task.instruction))
        result = tune(settings, lm=lm, splits=splits, progress=False)
        validation, rate, best_step = result.nll_after, result.learning_rate, result.best_step
        base, prompt = lm, compile_prompt(lm, result.prompt)
        trained = sum(tensor.numel() for tensor in result.prompt.tensors.values())
    else:
        torch.manual_seed(seed)
        model = arm.make(lm, plan, task.instruction)
        model.eval()  # without dropout, in every arm alike
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        trained = sum(weight.numel() for weight in weights)
        out.mkdir(parents=True, exist_ok=True)
        best_step = learn_weights(
            plan,
            weights,
            lambda batch: peft_nll(model, batch),
            lambda: held_out_nll(model, plan),
            rate or math.nan,
            out / "best.pt",
            lambda event: None,
        )
        validation = held_out_nll(model, plan)
        if arm.kind == "prompt":
            tensors = plain(model, isinstance(model.active_peft_config, peft.PrefixTuningConfig))
            tensors = tensors if isinstance(tensors, tuple) else (tensors,)
            trained = sum(tensor.numel() for tensor in tensors)  # an encoder is folded into its vectors
            template, target = str(plan.template), plan.template.target
            save_prompt(prompt_of(tensors, base=lm.fingerprint, template=template, target=target), out)
            base, prompt = lm, compile_prompt(lm, load_prompt(out))
        else:
            base = served(model.merge_and_unload() if isinstance(model, peft.PeftModel) else model, lm)
            prompt = compile_prompt(base, None, template=plan.template)
    seconds = time.process_time() - began
    record: dict[str, Any] = {"best_step": best_step, "validation_nll": validation, "rate_taken": rate}
    record |= {"trained": trained, "bytes": 4 * trained, "cpu_seconds": round(seconds, 1)}
    if arm.kind != "weights":
        record["file_bytes"] = prompt_bytes(out)
    if not judge:
        return record
    record["test"] = judged(base, prompt, plan.splits.test, given.metrics)
    by_peft = given.peft_checkout and seed == given.seeds[0] and arm.kind != "weights"
    if by_peft and "exact_match" in given.metrics:
        record["by_pefts_evaluate"] = by_pefts_evaluate(given.peft_checkout, lm, plan, out)
    return record


def judged(
    lm: FrozenLM, prompt: CompiledPrompt, examples: Sequence[Example], metrics: Sequence[str]
) -> dict[str, float]:
    """The test figures, by softprompt's evaluate."""
    chosen, layout = [METRICS[metric] for metric in metrics], prompt.template
    settings = settled(JudgeSettings(batch_rows=JUDGED_TOGETHER), lm, layout, examples)
    evaluation = judge_rows(predictor(lm, prompt, layout, chosen, settings), examples, chosen, layout)
    return {metric: evaluation.estimates[metric].value for metric in metrics}


def by_pefts_evaluate(checkout: Path, lm: FrozenLM, plan: Plan, out: Path) -> float | None:
    """The share of right labels as PEFT's own evaluate() generates them; None for a prompt that is not in front of all text."""
    prompt = load_prompt(out)
    if not prompt.template.startswith("{soft"):
        return None
    in_front = prompt_of(prompt.plain, base=lm.fingerprint)  # the texts are laid out here
    save_prompt(in_front, out / "peft", overwrite=True)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(lm.model), str(out / "peft")).eval()
    texts = [row_text(plan, example) for example in plan.splits.test]
    rows = Rows({**lm.tokenizer(text), "response": label} for text, label in texts)
    answers, labels = pefts_function(checkout)(
        model=model, tokenizer=lm.tokenizer, ds=rows, batch_size=8, generate_kwargs={"max_new_tokens": 16}
    )
    right = [
        answer[len(text) :].strip().split("\n")[0].strip() == label
        for answer, label, (text, _) in zip(answers, labels, texts, strict=True)
    ]
    return sum(right) / len(right)


def row_text(plan: Plan, example: Example) -> tuple[str, str]:
    """What is read before the answer, and the answer."""
    target = plan.template.target or ""
    layout = str(plan.template).split("{" + target + "}")[0]
    layout = layout.split("}", 1)[1].rstrip() if layout.startswith("{soft") else layout.rstrip()
    return layout.format(**example.fields), example.fields[target].strip()


class Rows(list[dict[str, Any]]):
    """Rows whose slices are columns, as those of the datasets library."""

    def __getitem__(self, at: Any) -> Any:
        part = super().__getitem__(at)
        return {name: [row[name] for row in part] for name in part[0]} if isinstance(at, slice) else part


def pefts_function(checkout: Path) -> Callable[..., tuple[list[str], list[str]]]:
    """`evaluate` of method_comparison/MetaMathQA/run.py, by itself: the module would load its own data and settings."""
    from tqdm import tqdm
    from transformers import GenerationConfig

    path = checkout / "method_comparison" / "MetaMathQA" / "run.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wanted = {"evaluate", "get_generation_config"}
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    names: dict[str, Any] = {"torch": torch, "tqdm": tqdm, "GenerationConfig": GenerationConfig}
    exec(compile(tree, str(path), "exec"), names)
    return names["evaluate"]  # type: ignore[no-any-return]


def recipe(task: Task, seed: int, given: Any, out: Path) -> Recipe:
    """The settings that all arms share."""
    return Recipe.from_flags(
        {},
        [
            "data.source=given",
            "data.validation=own",
            f"data.template={task.template}",
            f"data.target={task.target}",
            "data.on_overflow=truncate",
            f"data.max_length={given.positions}",
            f"prompt.length={LENGTH}",
            f"tune.batch_size={given.batch_size}",
            "tune.epochs=100",
            f"tune.max_steps={given.steps}",
            f"tune.seed={seed}",
            f"out={out}",
        ],
    )


def summary(runs: Sequence[Mapping[str, Any]], base: Mapping[str, float]) -> dict[str, Any]:
    """Every arm at the rate that validation chose: test figures, gain, its share of full fine-tuning's, and bytes.

    Unknown is None: no share without full fine-tuning, or where that gained nothing; no error of one seed."""
    by_arm: dict[str, dict[Any, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for each in runs:
        by_arm[each["arm"]][each["rate"] or "auto"].append(each)
    arms: dict[str, Any] = {}
    for arm, rates in by_arm.items():
        mean = {
            rate: statistics.fmean(each["validation_nll"] for each in group) for rate, group in rates.items()
        }
        rate = min(mean, key=lambda each: mean[each])
        group = rates[rate]
        tests = [each["test"] for each in group]
        nlls = [test["nll"] for test in tests]
        arms[arm] = {
            "rate": rate,
            "n": len(group),
            "rates_tried": sorted(mean, key=str),
            **{metric: statistics.fmean(test[metric] for test in tests) for metric in tests[0]},
            "nll_error": statistics.stdev(nlls) / len(nlls) ** 0.5 if len(nlls) > 1 else None,
            "bytes": group[0]["bytes"],
            "gain": base["nll"] - statistics.fmean(nlls),
        }
    full = arms.get("full", {}).get("gain")
    for figures in arms.values():
        figures["share_of_full"] = figures["gain"] / full if full and full > 0 else None
        figures["gain_per_kilobyte"] = figures["gain"] / (figures["bytes"] / 1000)
    return {"base": dict(base), "arms": arms, "bars": bars(arms)}


def bars(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, bool | None]:
    """Whether each bar holds on this set; None where an arm that it needs was not run."""

    def known(*names: str) -> bool:
        return all(name in arms for name in names)

    soft, deep = arms.get("softprompt soft"), arms.get("softprompt deep")
    tuning, prefixes = ([arms[name] for name in group if name in arms] for group in (PROMPT_TUNING, PREFIX))
    return {
        "soft below every prompt tuning that was run": all(soft["nll"] < other["nll"] for other in tuning)
        if soft and tuning
        else None,
        "deep below every prefix that was run": all(deep["nll"] < other["nll"] for other in prefixes)
        if deep and prefixes
        else None,
        "deep has lora 32's gain at a third of its bytes": deep["gain"] >= arms["lora 32"]["gain"]
        and 3 * deep["bytes"] <= arms["lora 32"]["bytes"]
        if deep and known("lora 32")
        else None,
        "soft has 85 % of lora 8's gain at a 200th of its bytes": soft["gain"]
        >= 0.85 * arms["lora 8"]["gain"]
        and 200 * soft["bytes"] <= arms["lora 8"]["bytes"]
        if soft and known("lora 8")
        else None,
    }


class Run(NamedTuple):
    """What makes two runs the same. `rate` is None where the arm settles its own; the arm "base" learns nothing."""

    base: str
    set: str
    arm: str
    rate: float | None
    seed: int
    steps: int


class NotKept(Exception):
    """A run that was never made."""


class Records:
    """The runs that were made, a JSON line each. Those of other `sizes` (rows a step, rows that are judged) are passed over."""

    def __init__(self, path: Path, sizes: Mapping[str, int]) -> None:
        self.path, self.sizes = path, dict(sizes)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found = [each for each in map(json.loads, lines) if each["sizes"] == self.sizes]
        self.known = {Run(**{name: each[name] for name in Run._fields}): each for each in found}

    def of(self, run: Run) -> dict[str, Any]:
        """A run's record. Raises NotKept where it was not made."""
        if run not in self.known:
            raise NotKept
        return self.known[run]

    def add(self, run: Run, record: Mapping[str, Any]) -> None:
        self.known[run] = {**run._asdict(), "sizes": self.sizes, **record}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.known[run]) + "\n")


@cache
def loaded(base: str, dtype: str) -> FrozenLM:
    return FrozenLM.load(base, dtype=dtype)


@cache
def task_of(name: str, trec_folder: Path | None) -> Task:
    return trec(trec_folder) if name == "trec" and trec_folder else SETS[name]()


def made(given: Any, run: Run) -> dict[str, Any]:
    """Makes a run; one that only looks for a rate is not judged."""
    torch.backends.cuda.matmul.allow_tf32 = given.tf32
    lm, task = loaded(given.base, given.dtype), task_of(run.set, given.trec)
    options = argparse.Namespace(**{**vars(given), "metrics": metrics_of(run.set)})
    options.steps = run.steps or given.steps
    with tempfile.TemporaryDirectory() as out:
        if run.arm == "base":
            splits = of_size(task.splits, options)
            plan = make_plan(recipe(task, 0, options, Path(out)), lm=lm, splits=splits)
            untuned = compile_prompt(lm, None, template=plan.template)
            record: dict[str, Any] = {"test": judged(lm, untuned, splits.test, options.metrics)}
        else:
            is_search = run.steps != given.steps
            record = learned(lm, task, run, options, Path(out) / "prompt", judge=not is_search)
    if lm.device.type == "cuda":
        torch.cuda.empty_cache()  # other workers share the GPU
    about = describe()
    machine = about["gpu"] or about["machine"]
    return {**record, "machine": machine, "dtype": given.dtype, "tf32": given.tf32, "date": about["date"]}


def metrics_of(name: str) -> list[str]:
    return METRICS_OF.get(name, ["nll", "exact_match"])


def rates_of(given: argparse.Namespace) -> dict[str, Sequence[float | None]]:
    """The arms that were asked for, each with the rates that are tried; softprompt's settle their own."""
    rates: dict[str, Sequence[float | None]] = {name: arm.rates or (None,) for name, arm in ARMS.items()}
    if given.quick:
        rates = {
            name: QUICK.get(name, own)
            for name, own in rates.items()
            if name in QUICK or (own == (None,) and not name.endswith(FORMER))
        }
    return {name: rates[name] for name in given.arms} if given.arms else rates


def planned(given: argparse.Namespace, name: str, records: Records) -> Iterator[Run]:
    """The runs on a set that count, seed by seed. With --search-steps, validation loss chooses each arm's rate."""
    base, rates = Path(given.base).name, rates_of(given)
    for seed in given.seeds:
        for arm, own in rates.items():
            if given.search_steps and len(own) > 1:
                try:
                    nlls = {run.rate: records.of(run)["validation_nll"] for run in searches(given, name, arm)}
                except NotKept:
                    pass  # without a whole search, the rates that went all the way count
                else:
                    rates[arm] = own = [min(nlls, key=lambda rate: nlls[rate])]
            for rate in own:
                yield Run(base, name, arm, rate, seed, given.steps)


def searches(given: argparse.Namespace, name: str, arm: str) -> list[Run]:
    """The short runs of the first seed that choose an arm's rate; none where there is nothing to choose."""
    rates = rates_of(given)[arm]
    if not given.search_steps or len(rates) == 1:
        return []
    base = Path(given.base).name
    return [Run(base, name, arm, rate, given.seeds[0], given.search_steps) for rate in rates]


def untuned(given: argparse.Namespace, name: str) -> Run:
    return Run(Path(given.base).name, name, "base", None, 0, 0)


def make_all(given: argparse.Namespace, records: Records) -> None:
    """Makes the runs that --runs lacks: bases and searches first, then the others seed by seed and arm by arm."""
    arms = list(rates_of(given))
    first = [untuned(given, name) for name in given.sets]
    first += [run for arm in arms for name in given.sets for run in searches(given, name, arm)]
    with workers(given.workers) as pool:
        make(given, first, records, pool)
        runs = [run for name in given.sets for run in planned(given, name, records)]
        runs.sort(key=lambda run: (given.seeds.index(run.seed), arms.index(run.arm)))
        make(given, runs, records, pool)


def make(given: argparse.Namespace, runs: Sequence[Run], records: Records, pool: Executor | None) -> None:
    """Makes those of `runs` that are not there; one that fails is said and passed over."""
    missing = [run for run in runs if run not in records.known]
    if pool is None:
        for run in missing:
            keep(run, partial(made, given, run), records)
    else:
        pending = {pool.submit(made, given, run): run for run in missing}
        for done in as_completed(pending):
            keep(pending[done], done.result, records)


def keep(run: Run, record_of: Callable[[], Mapping[str, Any]], records: Records) -> None:
    try:
        records.add(run, record_of())
    except Exception as error:
        print(*run, f"{type(error).__name__}: {error}", flush=True)
    else:
        print(json.dumps(records.of(run)), flush=True)


def workers(count: int) -> AbstractContextManager[Executor | None]:
    """Processes that make runs; None where they are made here."""
    if count == 1:
        return nullcontext()
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))


def summed_up(given: argparse.Namespace, records: Records) -> dict[str, Any]:
    """Every set's summary, of the runs that are there."""
    sets = {}
    for name in given.sets:
        runs = [records.known[run] for run in planned(given, name, records) if run in records.known]
        if runs:
            sets[name] = summary(runs, records.of(untuned(given, name))["test"])
    return sets


def table(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """Arms against sets: test loss in nats a token (with its standard error where there are seeds), then the set's own figure."""
    arms = [arm for arm in ARMS if any(arm in figures["arms"] for figures in sets.values())]
    lines = [f"| | {' | '.join(sets)} | kB |", "|---" * (len(sets) + 2) + "|"]
    for arm in arms:
        cells, size = [], 0.0
        for figures in sets.values():
            found = figures["arms"].get(arm)
            cells.append(cell(found) if found else "")
            size = found["bytes"] / 1000 if found else size
        mark = "**" if ARMS[arm].kind == "ours" else ""
        lines.append(f"| {mark}{arm}{mark} | {' | '.join(cells)} | {size:,.0f} |")
    return "\n".join(lines)


def cell(figures: Mapping[str, Any]) -> str:
    error = f" ± {figures['nll_error']:.3f}" if figures["nll_error"] is not None else ""
    own = f", {figures['exact_match']:.2f}" if "exact_match" in figures else ""
    own = f", {figures['bleu']:.1f}" if "bleu" in figures else own
    return f"{figures['nll']:.3f}{error}{own}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="bases/smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sets", nargs="+", choices=[*SETS, "trec"], default=list(SETS))
    parser.add_argument("--trec", type=Path, help="the folder of TREC's questions, for the set trec")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS))
    parser.add_argument("--quick", action="store_true", help="six arms, each at one rate")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--search-steps", type=int, default=0, help="0: every rate goes all the way")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--validation-rows", type=int, default=64)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--tf32", action="store_true", help="float32 products on a GPU in TF32, in every arm")
    parser.add_argument("--workers", type=int, default=1, help="so many runs at a time")
    parser.add_argument("--runs", type=Path, required=True, help="a JSON line a run")
    parser.add_argument("--kept", action="store_true", help="run nothing; sum up what --runs holds")
    parser.add_argument("--peft-checkout", type=Path)
    parser.add_argument("--out", type=Path, help="the summary as JSON")
    parser.add_argument("--page", type=Path, help="the page whose table is rewritten")
    parser.add_argument("--table", default="peer", help="the name of that table, where a page has several")
    given = parser.parse_args()
    if "trec" in given.sets and given.trec is None and not given.kept:
        parser.error("the set trec needs --trec FOLDER, with train_5500.label and TREC_10.label in it")
    records = Records(given.runs, {name: getattr(given, name) for name in SIZES})
    if not given.kept:
        make_all(given, records)
    sets = summed_up(given, records)
    text = table(sets)
    print(text)
    if given.out:
        given.out.write_text(json.dumps(sets, indent=1) + "\n", encoding="utf-8")
    if given.page:
        put_table(given.page, given.table, text)


def of_size(splits: Splits, given: Any) -> Splits:
    """As many rows as the runs read."""
    train = splits.train[: given.steps * given.batch_size]
    return Splits(
        train, splits.validation[: given.validation_rows], splits.test[: given.test_rows], splits.source
    )


if __name__ == "__main__":
    main()
