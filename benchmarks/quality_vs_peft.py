"""How good prompts get: PEFT's ways against softprompt's, on the same base, rows, steps, tokens and seeds.

    python benchmarks/quality_vs_peft.py --base builtin --sets messages roles --steps 60 --out benchmarks/quality.json

Every arm learns 20 virtual tokens in front of the text, in float32, for the same steps on the same batches, with linear
decay and a gradient norm of at most 1, and keeps its best validated step. PEFT has no optimiser of its own: its arms take
AdamW, as Trainer and PEFT's notebooks do, with every rate of --peft-rates, and the one with the lowest validation loss
over the seeds counts; softprompt's take their own optimiser (one arm AdamW) and automatic rate, and get one try. The test rows are scored once, by one code for all arms: loss, and for sets with a target the share
of rows that greedy decoding would answer exactly. Runs that are in --work already are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch

from machine import describe
from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.batch import collate, epoch_order
from softprompt.data.encoded import Encoded
from softprompt.data.example import Example, Splits
from softprompt.data.source import load_splits
from softprompt.loss.gradient import Gradients
from softprompt.progress.events import Event, Stepped, Validated
from softprompt.tuning.loop import tune
from softprompt.tuning.plan import Plan
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.scores import exact_match
from softprompt.tuning.settle import make_plan

LENGTH = 20
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@dataclass(frozen=True)
class Task:
    """Rows, how they become text, and what a person would write in front."""

    splits: Splits
    template: str
    target: str | None
    instruction: str


def builtin(name: str) -> Splits:
    return load_splits(f"builtin:{name}", column="prompt" if name == "roles" else None)


def banking77() -> Splits:
    def rows(split: str) -> list[dict[str, str]]:
        with (DATA / "banking77" / f"{split}.csv").open(encoding="utf-8") as file:
            return [
                {"text": row["text"].strip(), "label": row["category"].replace("_", " ")}
                for row in csv.DictReader(file)
            ]

    return _splits(rows("train"), rows("test"), "banking77")


def snips() -> Splits:
    def rows(pattern: str) -> list[dict[str, str]]:
        found = []
        for path in sorted((DATA / "snips").glob(pattern)):
            intent, said = next(iter(json.loads(path.read_text(encoding="utf-8", errors="replace")).items()))
            label = "".join(f" {sign.lower()}" if sign.isupper() else sign for sign in intent).strip()
            texts = ("".join(piece["text"] for piece in one["data"]).strip() for one in said)
            found += [{"text": text, "label": label} for text in texts if text]
        return found

    return _splits(rows("train_*_full.json"), rows("validate_*.json"), "snips")


def e2e() -> Splits:
    def rows(name: str, wanted: str) -> list[dict[str, str]]:
        with (DATA / "e2e_nlg" / name).open(encoding="utf-8") as file:
            return [{"text": row["mr"], "label": row[wanted]} for row in csv.DictReader(file)]

    return _splits(rows("devset.csv", "ref"), rows("testset_w_refs.csv", "ref"), "e2e_nlg")


def _splits(train: list[dict[str, str]], test: list[dict[str, str]], source: str) -> Splits:
    """Shuffled once; the last 200 of the training rows are for validation."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = [train[place] for place in order]
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0)).tolist()
    parts = (mixed[:-200], mixed[-200:], [test[place] for place in order])
    return Splits(*(tuple(Example(row, row=n) for n, row in enumerate(part)) for part in parts), source)


TASKS: dict[str, Callable[[], Task]] = {
    "messages": lambda: Task(
        builtin("messages"),
        "{soft}Message: {text} Kind: {label}",
        "label",
        "Messages to a shop, each with its kind: delivery, payment, return, account, thanks or job.\n",
    ),
    "facts": lambda: Task(
        builtin("facts"),
        "{soft}{name}, {kind}, {place}, {detail}. Sentence: {sentence}",
        "sentence",
        "Each line names a thing, its kind, its place and a detail, and then says so in one sentence.\n",
    ),
    "roles": lambda: Task(
        builtin("roles"), "{soft}{text}", None, "I want you to act as someone, and to do as I ask of you.\n"
    ),
    "banking77": lambda: Task(
        banking77(),
        "{soft}Question: {text} Intent: {label}",
        "label",
        "Questions of customers to a bank, each followed by what they are about.\n",
    ),
    "snips": lambda: Task(
        snips(),
        "{soft}Request: {text} Intent: {label}",
        "label",
        "Requests to a speaking machine, each followed by what is wanted, such as play music.\n",
    ),
    "e2e_nlg": lambda: Task(
        e2e(),
        "{soft}{text} Sentence: {label}",
        "label",
        "Facts about a restaurant, and then a sentence that says them all.\n",
    ),
}
PEFT: dict[str, Callable[[], peft.PeftConfig]] = {
    "PEFT, prompt tuning (random, its default)": lambda: peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=LENGTH
    ),
    "PEFT, prompt tuning (sampled vocabulary)": lambda: peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, prompt_tuning_init="SAMPLE_VOCAB"
    ),
    "PEFT, p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, encoder_hidden_size=128
    ),
    "PEFT, prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH),
}
OURS: dict[str, Callable[[Task], list[str]]] = {
    "softprompt, default": lambda task: [],
    "softprompt, by AdamW": lambda task: ["tune.optimizer=adamw"],
    "softprompt, text start": lambda task: [f"prompt.init_text={task.instruction}"],
    "softprompt, residual": lambda task: ["prompt.form=residual"],
    "softprompt, deep": lambda task: ["prompt.kind=deep", f"prompt.init_text={task.instruction}"],
}


@dataclass(frozen=True)
class Run:
    """One arm, rate and seed: its validation curve [(step, nats, seconds of learning)] and its figures."""

    curve: list[tuple[int, float, float]]
    test_nll: float
    test_exact: float

    @property
    def validation(self) -> float:
        return min(nll for _, nll, _ in self.curve)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", default="builtin")
    parser.add_argument("--sets", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peft-rates", type=float, nargs="+", default=[0.005, 0.03])
    parser.add_argument("--validation-rows", type=int, default=64)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--validations", type=int, default=12)
    parser.add_argument("--work", type=Path, default=Path("runs/quality_vs_peft"))
    parser.add_argument("--note", help="what a reader should know of this run")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lm = FrozenLM.load(given.base, dtype="float32")
    result: dict[str, Any] = {
        "settings": {key: value for key, value in vars(given).items() if key not in ("out", "work", "base")},
        "base": Path(given.base).name,
        **describe(),
        "sets": {},
    }
    for name in given.sets:
        task = TASKS[name]()
        runs = learned(lm, name, task, given)
        result["sets"][name] = summary(runs)
        for arm, told in result["sets"][name]["arms"].items():
            print(f"{name}: {arm}: {told}", flush=True)
        if given.out:
            given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def learned(
    lm: FrozenLM, name: str, task: Task, given: argparse.Namespace
) -> dict[tuple[str, str], list[Run]]:
    """Every arm, rate and seed; what is in the work folder already is read."""
    runs: dict[tuple[str, str], list[Run]] = {}
    for seed in range(given.seeds):
        for arm in [*OURS, *PEFT]:
            for rate in ["auto"] if arm in OURS else [str(rate) for rate in given.peft_rates]:
                place = (
                    given.work / Path(given.base).name / name / f"{arm} {rate} {seed}.json".replace("/", "-")
                )
                if place.exists():
                    run = Run(**json.loads(place.read_text(encoding="utf-8")))
                else:
                    recipe = the_recipe(task, arm, rate, seed, given, place.with_suffix(""))
                    plan = make_plan(recipe, lm=lm, splits=bounded(task.splits, given))
                    run = ours(plan) if arm in OURS else theirs(plan, PEFT[arm](), float(rate), seed)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_text(json.dumps(vars(run)), encoding="utf-8")
                runs.setdefault((arm, rate), []).append(run)
    return runs


def bounded(splits: Splits, given: argparse.Namespace) -> Splits:
    rows = given.steps * given.batch_size
    return Splits(
        splits.train[:rows],
        splits.validation[: given.validation_rows],
        splits.test[: given.test_rows],
        splits.source,
    )


def the_recipe(task: Task, arm: str, rate: str, seed: int, given: argparse.Namespace, out: Path) -> Recipe:
    rows = min(len(task.splits.train), given.steps * given.batch_size)
    own = OURS[arm](task) if arm in OURS else []
    # A fixed template; the fields are the task's own.
    overrides = [
        "data.source=given",
        "data.validation=own",
        f"data.template={task.template}",
        *([f"data.target={task.target}"] if task.target else []),
        "data.on_overflow=truncate",
        "data.max_length=256",
        f"prompt.length={LENGTH}",
        f"tune.batch_size={given.batch_size}",
        f"tune.epochs={math.ceil(given.steps / math.ceil(rows / given.batch_size))}",
        f"tune.max_steps={given.steps}",
        f"tune.valid_every_steps={max(1, given.steps // given.validations)}",
        f"tune.seed={seed}",
        f"out={out}",
        *own,
    ]
    return Recipe.from_flags({}, overrides)


def ours(plan: Plan) -> Run:
    """softprompt as anyone would call it."""
    curve: list[tuple[int, float, float]] = []
    seconds, last = 0.0, time.perf_counter()

    def watch(event: Event) -> None:
        nonlocal seconds, last
        now = time.perf_counter()
        if isinstance(event, Stepped):
            seconds += now - last
        elif isinstance(event, Validated):
            curve.append((event.step, event.nll, seconds))
        last = now

    tuned = tune(plan.recipe, lm=plan.lm, splits=plan.splits, on_event=watch)
    tensors = list(tuned.prompt.tensors.values())
    return Run(curve, *scored(plan, tensors[0] if len(tensors) == 1 else (tensors[0], tensors[1])))


def theirs(plan: Plan, config: peft.PeftConfig, rate: float, seed: int) -> Run:
    """PEFT's model in a plain loop: the same batches, AdamW, linear decay."""
    torch.manual_seed(seed)
    deep = isinstance(config, peft.PrefixTuningConfig)
    model = peft.get_peft_model(plan.lm.model, config)
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0
    )
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / plan.steps)
    gradients = Gradients(plan.lm, plan.batch_size)
    held_out = [without_slots(row) for row in plan.held_out] if deep else plan.held_out
    rows = [without_slots(row) for row in plan.train.encoded]
    every = plan.recipe.tune.valid_every_steps or plan.steps
    curve: list[tuple[int, float, float]] = []
    best: Any = None
    seconds, step = 0.0, 0

    def validate() -> None:
        nonlocal best
        prompt = plain(model, deep)
        (nll,) = gradients.losses([prompt], [held_out])
        if best is None or nll < min(one[1] for one in curve):
            best = prompt
        curve.append((step, nll, seconds))

    validate()
    while step < plan.steps:
        epoch, done = divmod(step, plan.steps_per_epoch)
        order = epoch_order(plan.train.lengths, plan.batch_size, seed=seed, epoch=epoch)
        for indices in order[done : done + plan.steps - step]:
            began = time.perf_counter()
            batch = collate([rows[index] for index in indices])
            mask = torch.arange(batch.ids_BS.shape[1])[None] < batch.lengths_B[:, None]
            labels = batch.ids_BS.masked_fill(~batch.trained_BS, -100)
            model(input_ids=batch.ids_BS, attention_mask=mask.long(), labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            decay.step()
            optimiser.zero_grad()
            seconds += time.perf_counter() - began
            step += 1
            if step % every == 0 or step == plan.steps:
                validate()
    return Run(curve, *scored(plan, best))


def plain(model: Any, deep: bool) -> Any:
    """PEFT's prompt as it reaches the base: vectors [P, D], or keys and values [L, P, H, K]."""
    model.eval()
    with torch.no_grad():
        prompt = model.get_prompt(batch_size=1)
    model.train()
    plain_mode(model)
    if not deep:
        return prompt[0].clone()
    layers = [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in prompt.layers]
    keys, values = zip(*layers, strict=True)
    return torch.stack(keys).clone(), torch.stack(values).clone()


def plain_mode(model: Any) -> None:
    """The base itself stays in eval mode, so that no dropout of it differs between the arms."""
    model.get_base_model().eval()


def without_slots(row: Encoded) -> Encoded:
    keep = [place < 0 for place in row.soft]

    def kept(values: Sequence[Any]) -> list[Any]:
        return [value for value, keeps in zip(values, keep, strict=True) if keeps]

    return Encoded(kept(row.ids), kept(row.soft), kept(row.trained), row.row, row.text_bytes)


def scored(plan: Plan, prompt: Any) -> tuple[float, float]:
    """Loss and exact answers on the test rows, once."""
    deep = not isinstance(prompt, torch.Tensor)
    test = Splits(plan.splits.test, plan.splits.test, (), plan.splits.source)
    recipe = plan.recipe.changed(
        ["prompt.kind=deep", "prompt.init_text=null"] if deep else ["prompt.kind=soft"]
    )
    rows = make_plan(recipe, lm=plan.lm, splits=test).held_out
    (nll,) = Gradients(plan.lm, plan.batch_size).losses([prompt], [rows])
    exact = exact_match(plan.lm, rows, prompt, plan.batch_size) if plan.template.target else math.nan
    return nll, exact


def summary(runs: dict[tuple[str, str], list[Run]]) -> dict[str, Any]:
    """Each arm at the rate that validation chose; and how soon softprompt is where PEFT's default ends."""
    arms: dict[str, Any] = {}
    chosen: dict[str, list[Run]] = {}
    for arm in dict.fromkeys(arm for arm, _ in runs):
        rates = {rate: group for (name, rate), group in runs.items() if name == arm}
        rate = min(rates, key=lambda one: statistics.fmean(run.validation for run in rates[one]))
        chosen[arm] = rates[rate]
        arms[arm] = {
            "rate": rate,
            "validation_nll": told([run.validation for run in rates[rate]]),
            "test_nll": told([run.test_nll for run in rates[rate]]),
            "test_exact": told([run.test_exact for run in rates[rate]]),
            "validation_nll_by_rate": {
                one: round(statistics.fmean(run.validation for run in group), 4)
                for one, group in rates.items()
            },
        }
    default = next(iter(PEFT))
    sooner: dict[str, Any] = {}
    for (arm, rate), others in runs.items():
        if arm != default:
            continue
        sooner[f"until the best validation loss of {default} at rate {rate}"] = {
            own: {
                "times_fewer_steps": [pair[0] for pair in pairs],
                "times_less_time": [pair[1] for pair in pairs],
            }
            for own in OURS
            if (pairs := [reached(mine, other) for mine, other in zip(chosen[own], others, strict=True)])
        }
    return {"arms": arms, "sooner": sooner}


def reached(mine: Run, other: Run) -> tuple[float | None, float | None]:
    """Steps and seconds that the other took to its best validation loss, over ours to reach it; None if never."""
    step, goal, seconds = min(other.curve, key=lambda one: one[1])
    for own_step, nll, own_seconds in mine.curve:
        if nll <= goal:
            return round(step / max(own_step, 1), 2), round(
                seconds / max(own_seconds, 1e-9), 2
            ) if own_step else None
    return None, None


def told(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard error and n."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return {"mean": None, "error": None, "n": 0}
    error = statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None
    return {
        "mean": round(statistics.fmean(known), 4),
        "error": None if error is None else round(error, 4),
        "n": len(known),
    }


if __name__ == "__main__":
    main()
