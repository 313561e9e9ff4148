"""Learning a prompt, on one page: batches, loss through the frozen base, the prompt's gradient, a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.batch import Encoded, collate, epoch_order
from softprompt.data.example import Splits
from softprompt.errors import NotFinite, OutOfMemory
from softprompt.evaluate.loss import mean_nll
from softprompt.prompt.reparam import Form, Plain
from softprompt.prompt.soft_prompt import DeepPrompt, Prompt, SoftPrompt
from softprompt.store.artifact import prompt_bytes, save_prompt
from softprompt.tune.events import BatchHalved, Event, Said, Saved, Started, Stepped, Stopped, Validated
from softprompt.tune.optim import OPTIMIZERS, rate_factor
from softprompt.tune.plan import Plan, make_plan, start
from softprompt.tune.recipe import Recipe
from softprompt.tune.records import RunFolder, peak_memory_bytes, versions


@dataclass(frozen=True)
class Tuned:
    """The best prompt of a run, and the run's figures as plain data (losses in nats per trained token)."""

    prompt: Prompt
    record: dict[str, Any]


def tune(
    recipe: Recipe,
    *,
    lm: FrozenLM | None = None,
    splits: Splits | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Tuned:
    """Learn a prompt as `recipe` says and save the best validated one in `recipe.out`.

    `lm` and `splits` stand in for what the recipe would load. Held-out loss is measured before the first step too, so
    the result is never worse there than its start. On Ctrl-C, a loss that is not finite or any other failure, the
    best prompt so far is saved before the exception goes on. Raises the errors of softprompt.errors.
    """
    plan = make_plan(recipe, lm=lm, splits=splits)
    form = start(plan)
    folder = RunFolder(Path(recipe.out), recipe)

    def tell(event: Event) -> None:
        folder(event)
        on_event(event)

    run = _Run(plan, form, tell)
    try:
        return run.save(run.learn())
    except BaseException as error:
        if run.step:  # else there is nothing worth keeping, and a former prompt in that folder stays
            run.save("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    finally:
        folder.close()


class _Run:
    """One run's moving parts. `best` is the prompt of the best held-out loss so far, which is what gets saved."""

    def __init__(self, plan: Plan, form: Form, tell: Callable[[Event], None]) -> None:
        self.plan, self.form, self.tell = plan, form, tell
        tune = plan.recipe.tune
        self.optimiser = OPTIMIZERS[tune.optimizer](form.parameters, plan.learning_rate, tune.weight_decay)
        self.micro = plan.batch_size
        self.began = time.perf_counter()
        self.step, self.best_step, self.tokens, self.learning_seconds = 0, 0, 0, 0.0
        self.nll_base = self.nll_start = self.nll_best = math.nan
        self.best: Plain = _detached(form())
        self.without_gain = 0

    def learn(self) -> str:
        """Run all steps; says why it ended."""
        plan, tune = self.plan, self.plan.recipe.tune
        self.nll_base = mean_nll(plan.lm, plan.held_out_base, batch_size=self.micro)
        self._announce()
        self.validate()
        self.nll_start = self.nll_best
        lengths = plan.train.lengths
        valid_every = tune.valid_every_steps or plan.steps_per_epoch
        while self.step < plan.steps:
            epoch = self.step // plan.steps_per_epoch
            order = epoch_order(lengths, plan.batch_size, seed=tune.seed, epoch=epoch)
            for indices in order[self.step % plan.steps_per_epoch :][: plan.steps - self.step]:
                self.learn_from([plan.train.encoded[index] for index in indices])
                last = self.step == plan.steps
                if last or (self.step % valid_every == 0 and plan.judged_on == "validation"):
                    self.validate()
                    if tune.patience and self.without_gain >= tune.patience and not last:
                        return "patience"
        return "finished"

    def learn_from(self, rows: Sequence[Encoded]) -> None:
        """One optimiser step on `rows`: the mean loss of their trained tokens, however they are split to fit."""
        plan, tune = self.plan, self.plan.recipe.tune
        began = time.perf_counter()
        rate = plan.learning_rate * rate_factor(tune.schedule, self.step + 1, plan.steps, tune.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        nll = self.backward(rows)
        norm = torch.nn.utils.clip_grad_norm_(self.form.parameters, tune.clip or math.inf)
        if not math.isfinite(nll) or not bool(torch.isfinite(norm)):
            raise NotFinite(self._not_finite(rows, nll, rate))
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        tokens = sum(place < 0 for row in rows for place in row.soft)
        self.tokens += tokens
        self.learning_seconds += time.perf_counter() - began
        pace = self.tokens / self.learning_seconds
        ahead = plan.text_tokens * plan.steps / plan.steps_per_epoch - self.tokens
        self.tell(
            Stepped(
                step=self.step,
                steps=plan.steps,
                epoch=self.step / plan.steps_per_epoch,
                nll=nll,
                learning_rate=rate,
                tokens_per_second=pace,
                remaining_seconds=max(0.0, ahead / pace),
            )
        )

    def backward(self, rows: Sequence[Encoded]) -> float:
        """Gradient of the rows' mean loss; where memory runs out, in halves of the batch from then on."""
        while True:
            try:
                return self._backward(rows)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                self.optimiser.zero_grad()
                largest = min(self.micro, len(rows))
                if largest == 1:
                    raise OutOfMemory(
                        f"{max(map(len, rows))} positions of one row do not fit into memory. Shorten the text with "
                        "data.max_length and data.on_overflow: truncate, or take a smaller base."
                    ) from error
                self.micro = math.ceil(largest / 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.tell(BatchHalved(self.micro, math.ceil(self.plan.batch_size / self.micro)))

    def _backward(self, rows: Sequence[Encoded]) -> float:
        tokens = sum(row.trained_tokens for row in rows)
        total = 0.0
        for first in range(0, len(rows), self.micro):
            batch = collate(rows[first : first + self.micro]).to(self.plan.lm.device)
            nll, _ = self.plan.lm.nll(batch, _to(self.form(), self.plan.lm.device))
            (nll / tokens).backward()  # type: ignore[no-untyped-call]
            total += nll.item()
        return total / tokens

    def validate(self) -> None:
        """Measure held-out loss, and keep the prompt if it is the best so far (or the last, with none held out)."""
        prompt = _detached(self.form())
        nll = mean_nll(
            self.plan.lm, self.plan.held_out, _to(prompt, self.plan.lm.device), batch_size=self.micro
        )
        judged = self.plan.judged_on == "validation"
        best = math.isnan(self.nll_best) or nll < self.nll_best or (not judged and math.isfinite(nll))
        if best:
            self.best, self.best_step, self.nll_best, self.without_gain = prompt, self.step, nll, 0
        else:
            self.without_gain += 1
        self.tell(Validated(step=self.step, nll=nll, best=best))

    def save(self, reason: str) -> Tuned:
        """Write the best prompt and tell where."""
        plan = self.plan
        if (
            plan.judged_on == "training"
            and self.best_step < self.step
            and _finite(latest := _detached(self.form()))
        ):
            self.best, self.best_step = (
                latest,
                self.step,
            )  # nothing is held out, so the latest is the best known
            self.nll_best = math.nan
        out = Path(plan.recipe.out)
        record: dict[str, Any] = {
            "path": str(out),
            "base": plan.lm.name,
            "judged_on": plan.judged_on,
            "nll_base": self.nll_base,
            "nll_before": self.nll_start,
            "nll_after": self.nll_best,
            "best_step": self.best_step,
            "steps": self.step,
            "tokens": self.tokens,
            "seconds": time.perf_counter() - self.began,
            "peak_memory_bytes": peak_memory_bytes(plan.lm.device),
            "learning_rate": plan.learning_rate,
            "batch_size": plan.batch_size,
            "accumulation": math.ceil(plan.batch_size / self.micro),
            "truncated_rows": plan.train.truncated,
            "dropped_rows": plan.train.dropped,
            "stopped": reason,
        }
        prompt = self._prompt(record)
        save_prompt(prompt, out)
        record["prompt_bytes"] = prompt_bytes(out)
        self.tell(Stopped(reason, self.step, self.best_step, self.nll_best))
        self.tell(Saved(str(out), record["prompt_bytes"]))
        return Tuned(prompt, record)

    def _prompt(self, record: dict[str, Any]) -> Prompt:
        plan = self.plan
        common: dict[str, Any] = {
            "base": plan.lm.fingerprint,
            "template": str(plan.template),
            "target": plan.template.target,
            "name": Path(plan.recipe.out).resolve().name,
            "notes": {
                "made": datetime.now(UTC).isoformat(timespec="seconds"),
                "data": {"source": plan.splits.source, "revision": plan.splits.revision},
                "metrics": {key: value for key, value in record.items() if key not in ("path", "base")},
                "recipe": plan.recipe.model_dump(),
                "versions": versions(),
            },
        }
        if isinstance(self.best, Tensor):
            return SoftPrompt(self.best, **common)
        keys_LPHK, values_LPHK = self.best
        return DeepPrompt(keys_LPHK, values_LPHK, **common)

    def _announce(self) -> None:
        plan = self.plan
        self.tell(
            Started(
                steps=plan.steps,
                epochs=plan.steps / plan.steps_per_epoch,
                batch_size=plan.batch_size,
                accumulation=1,
                learning_rate=plan.learning_rate,
                examples=len(plan.train.encoded),
                validation_examples=len(plan.splits.validation),
                trained_tokens=plan.trained_tokens,
                prompt_values=sum(parameter.numel() for parameter in self.form.parameters),
                baseline_nll=self.nll_base,
            )
        )
        for note in plan.splits.notes:
            self.tell(Said(note))
        if plan.train.truncated:
            self.tell(
                Said(f"{plan.train.truncated} texts were cut, by {plan.train.cut_tokens} tokens in all.")
            )
        if plan.train.dropped:
            self.tell(Said(f"{plan.train.dropped} rows were left out because they are too long."))
        if plan.judged_on == "training":
            self.tell(Said("Nothing is held out: losses before and after are those of the training rows."))

    def _not_finite(self, rows: Sequence[Encoded], nll: float, rate: float) -> str:
        """Which rows break the loss, seen one by one."""
        prompt = _to(_detached(self.form()), self.plan.lm.device)
        bad = [
            row.row for row in rows if not math.isfinite(mean_nll(self.plan.lm, [row], prompt, batch_size=1))
        ] or [row.row for row in rows]
        kept = f", and the prompt of step {self.best_step} is in {self.plan.recipe.out}" if self.step else ""
        return (
            f"Step {self.step + 1}: the loss or its gradient is not finite (loss {nll}, rate {rate:.3g}) on the rows "
            f"{', '.join(map(str, bad))} of the data. The step was refused{kept}. Lower tune.learning_rate, or load "
            "the base with dtype: float32."
        )


def _is_out_of_memory(error: BaseException) -> bool:
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in said for words in ("can't allocate memory", "not enough memory", "out of memory")
    )


def _detached(prompt: Plain) -> Plain:
    if isinstance(prompt, Tensor):
        return prompt.detach().clone()
    return prompt[0].detach().clone(), prompt[1].detach().clone()


def _to(prompt: Plain, device: torch.device) -> Plain:
    if isinstance(prompt, Tensor):
        return prompt.to(device)
    return prompt[0].to(device), prompt[1].to(device)


def _finite(prompt: Plain) -> bool:
    tensors = (prompt,) if isinstance(prompt, Tensor) else prompt
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
