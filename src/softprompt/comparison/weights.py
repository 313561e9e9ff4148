"""Learning weights in plain torch, on the same rows in the same order as a prompt learns: LoRA and full fine-tuning."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.quantised import is_quantised
from softprompt.data.batch import Batch, collate, epoch_order
from softprompt.errors import MissingExtra, NotFinite, RecipeError
from softprompt.loss.mean import mean_nll
from softprompt.progress.events import Event, Stepped, Validated
from softprompt.prompt.soft_prompt import Plain
from softprompt.tuning.optim import OPTIMIZERS, rate_factor
from softprompt.tuning.plan import Plan

Nll = Callable[[Batch], tuple[Tensor, int]]
LORA_RANK = 8


def learn_weights(
    plan: Plan,
    weights: Sequence[Tensor],
    nll: Nll,
    held_out_nll: Callable[[], float],
    rate: float,
    best: Path,
    tell: Callable[[Event], None],
) -> int:
    """Runs the plan's steps and leaves `weights` at the step of lowest held-out loss, and returns that loss."""
    rows = plan.task.to_learn(plan.learned_from, slots=False).encoded
    settings = plan.recipe.tune
    if settings.optimizer == "muon":  # a decomposition of every layer a step, and no rates known for it
        settings = plan.recipe.changed(["tune.optimizer=adamw"]).tune
    lengths = [len(row) for row in rows]
    optimiser = OPTIMIZERS[settings.optimizer](weights, rate, settings.weight_decay)
    lowest, best_step = math.inf, 0

    def validate(step: int) -> None:
        nonlocal lowest, best_step
        nll = held_out_nll()
        tell(Validated(step=step, nll=nll, best=nll < lowest))
        if nll < lowest or (plan.judged_on == "training" and math.isfinite(nll)):
            lowest, best_step = nll, step
            torch.save([weight.detach().cpu() for weight in weights], best)

    validate(0)
    step = 0
    while step < plan.steps:
        epoch = step // plan.steps_per_epoch
        order = epoch_order(lengths, plan.batch_size, seed=settings.seed, epoch=epoch)
        for indices in order[: plan.steps - step]:
            factor = rate_factor(settings.schedule, step + 1, plan.steps, settings.warmup_share)
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
            total, tokens = nll(collate([rows[index] for index in indices]).to(plan.lm.device))
            loss = total / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(weights, settings.clip or math.inf)
            if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(norm)):
                raise NotFinite(
                    f"step {step + 1}: the loss or its gradient is not finite (rate {rate:.3g}). "
                    "Give this arm a lower rate with --rate."
                )
            optimiser.step()
            optimiser.zero_grad()
            step += 1
            tell(
                Stepped(
                    step=step,
                    steps=plan.steps,
                    epoch=step / plan.steps_per_epoch,
                    nll=float(loss.detach()),
                    learning_rate=rate * factor,
                    tokens_per_second=math.nan,
                    remaining_seconds=math.nan,
                )
            )
            if step == plan.steps or step % plan.valid_every_steps == 0:
                validate(step)
    for weight, kept in zip(weights, torch.load(best, weights_only=True), strict=True):
        weight.data.copy_(kept)
    best.unlink()
    return best_step


def with_lora(lm: FrozenLM, seed: int) -> tuple[Any, list[Tensor]]:
    """Puts low-rank updates of rank 8 beside every linear layer, in place; gives PEFT's model and what is trained."""
    try:
        import peft
    except ImportError:
        raise MissingExtra(
            "The arm lora needs PEFT, which is not installed. Run: pip install 'softprompt[lora]'"
        ) from None
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(lm.model, config)
    return model, [weight for weight in model.parameters() if weight.requires_grad]


def trainable_copy(lm: FrozenLM) -> Any:
    """A copy of the base in float32, where small updates are not rounded away, every weight trainable."""
    if is_quantised(lm.model):
        raise RecipeError(
            f"The arm full learns every weight, and those of {lm.name} are quantised. Leave it out, or load the base in full."
        )
    return copy.deepcopy(lm.model).float().requires_grad_(True)


def plain_nll(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """Summed loss of the trained tokens through the whole model, and how many they are."""
    nll_N = plain_token_nll(model, batch)
    return nll_N.sum(), len(nll_N)


def plain_token_nll(model: Any, batch: Batch) -> Tensor:
    """Loss of every trained token in nats, float32 [N], through the whole model, its output layer too."""
    mask_BS = torch.arange(batch.ids_BS.shape[1], device=batch.ids_BS.device) < batch.lengths_B[:, None]
    logits_BSV = model(input_ids=batch.ids_BS, attention_mask=mask_BS.long(), use_cache=False).logits
    trained_BS = batch.trained_BS[:, 1:]
    logits_NV = logits_BSV[:, :-1][trained_BS].float()
    return torch.nn.functional.cross_entropy(logits_NV, batch.ids_BS[:, 1:][trained_BS], reduction="none")


def served(model: Any, lm: FrozenLM) -> FrozenLM:
    """`model` as a separate base. It is wrapped again whenever its weights have changed: a FrozenLM may keep copies."""
    return FrozenLM.wrap(model, lm.tokenizer, name=lm.name)


def held_out(model: Any, plan: Plan) -> float:
    """Loss on the rows that choose the best step, by `model` as it is now."""

    def token_nll(batch: Batch, prompt: Plain | None = None) -> Tensor:
        return plain_token_nll(model, batch.to(plan.lm.device))

    return mean_nll(token_nll, plan.held_out_base, batch_size=plan.batch_size)
