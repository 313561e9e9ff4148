"""Train the bundled base: plain torch on transformers' BLOOM, on a CPU or a GPU.

    python pretrain/train.py --tokens WORK/tokens --work WORK/run --from-weights src/softprompt/base/builtin --minutes 90

Muon for the matrices inside the blocks, AdamW for embeddings, norms and biases. The rate warms up, stays, and falls
linearly to zero over the last four fifths of the budget; the budget is --steps, or --minutes of training so that a run on a
shared machine still ends decayed. Call it again to go on from the last checkpoint; with --steps it goes on bit for bit.
WORK/run/curve.jsonl holds the curve, WORK/run/model the weights of the last checkpoint in transformers' layout.

On a busy CPU two processes of one thread each get twice as far as one process of two threads, which waits for its slower
thread at every operation: `torchrun --nproc-per-node 2 pretrain/train.py ...` splits each batch and sums the gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from model import alibi_HTT, cast, head_loss, hidden_BTD
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

# Shares of the tokens drawn from each source: before LATE_FROM, and after.
EARLY = {
    "books": 0.46,
    "openstax": 0.29,
    "gov": 0.09,
    "factbook": 0.02,
    "children": 0.08,
    "sentences": 0.04,
    "dialogues": 0.02,
}
LATE = {
    "books": 0.29,
    "openstax": 0.32,
    "gov": 0.08,
    "factbook": 0.03,
    "children": 0.14,
    "sentences": 0.04,
    "dialogues": 0.02,
    "own": 0.08,
}
WARMUP, FALL, LATE_FROM = 0.02, 0.8, 0.35  # shares of the budget
LONGEST_STEP = 10.0  # seconds: what a paused process waited is not training time


@dataclass
class Stream:
    """One source as windows of text: each pass cuts it at a new offset and shuffles the windows."""

    ids: np.ndarray[Any, np.dtype[np.uint16]]
    length: int
    seed: int
    drawn: int = 0

    def next(self) -> np.ndarray[Any, Any]:
        per_pass = (len(self.ids) - self.length) // self.length
        epoch, at = divmod(self.drawn, per_pass)
        if at == 0 or not hasattr(self, "order"):
            rng = np.random.default_rng([self.seed, epoch])
            self.offset = int(rng.integers(self.length))
            self.order = rng.permutation(per_pass)
        self.drawn += 1
        start = min(self.offset + int(self.order[at]) * self.length, len(self.ids) - self.length - 1)
        return self.ids[start : start + self.length + 1].astype(np.int64)


def streams(folder: Path, length: int, seed: int) -> dict[str, Stream]:
    """A stream for every source that has been prepared; a missing one is left out of the mix."""
    found = {}
    for number, name in enumerate(sorted({*EARLY, *LATE})):
        path = folder / f"{name}.bin"
        if path.exists():
            found[name] = Stream(np.memmap(path, dtype=np.uint16, mode="r"), length, seed * 1000 + number)
    if not found:
        raise FileNotFoundError(f"found no token files in {folder}; run prepare.py first")
    return found


def shares(progress: float, names: list[str]) -> np.ndarray[Any, Any]:
    mix = EARLY if progress < LATE_FROM else LATE
    weights = np.array([mix.get(name, 0.0) for name in names])
    normalised: np.ndarray[Any, Any] = weights / weights.sum()
    return normalised


def rate(progress: float) -> float:
    """The share of the full rate at this share of the budget."""
    return max(0.0, min(1.0, (progress + 1e-3) / WARMUP, (1 - progress) / FALL))


def optimisers(model: torch.nn.Module, muon_rate: float, adam_rate: float) -> list[torch.optim.Optimizer]:
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    table = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." not in name]
    small = [p for p in model.parameters() if p.ndim == 1]
    made: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            inner, lr=muon_rate, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(table + small, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimiser in made:
        for group in optimiser.param_groups:
            group["full_rate"] = group["lr"]
    return made


def sum_gradients(model: torch.nn.Module, seconds: float, loss: float) -> tuple[float, float]:
    """Average gradients, clock and loss over the processes, so that all take the same step at the same rate."""
    if not dist.is_initialized():
        return seconds, loss
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([*(g.reshape(-1) for g in grads), torch.tensor([seconds, loss], device=grads[0].device)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, part in zip(grads, torch.split(flat[:-2], [g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))
    return flat[-2].item(), flat[-1].item()


def save(
    path: Path, model: BloomForCausalLM, opts: list[torch.optim.Optimizer], state: dict[str, Any]
) -> None:
    """Write the checkpoint beside the old one, then put it in its place: a kill never leaves half a file."""
    model.save_pretrained(path / "model")
    record = {"model": model.state_dict(), "optimisers": [o.state_dict() for o in opts], **state}
    torch.save(record, path / "checkpoint.new")
    os.replace(path / "checkpoint.new", path / "checkpoint.pt")


def train(arguments: argparse.Namespace) -> Any:
    torch.manual_seed(arguments.seed)
    work, device = arguments.work, torch.device(arguments.device)
    work.mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if arguments.from_weights is not None:
        model: Any = AutoModelForCausalLM.from_pretrained(arguments.from_weights, dtype=torch.float32)
    else:
        model = BloomForCausalLM(BloomConfig(**json.loads(arguments.config.read_text())))
    model = model.float().to(device)
    config = model.config
    opts = optimisers(model, arguments.muon_rate, arguments.adam_rate)
    data = streams(arguments.tokens, arguments.length, arguments.seed)
    names = list(data)
    step, tokens, seconds = 0, 0, 0.0
    if (work / "checkpoint.pt").exists():
        kept = torch.load(work / "checkpoint.pt", map_location=device, weights_only=False)
        model.load_state_dict(kept["model"])
        for optimiser, state in zip(opts, kept["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        step, tokens, seconds = kept["step"], kept["tokens"], kept["seconds"]
        for name, drawn in kept["drawn"].items():
            data[name].drawn = drawn
    bias_HTT = alibi_HTT(config.n_head, arguments.length, device)
    body = torch.compile(hidden_BTD, dynamic=False) if arguments.compile else hidden_BTD
    dtype = getattr(torch, arguments.dtype)
    parameters = dict(model.named_parameters())

    def checkpoint() -> None:
        drawn = {name: stream.drawn for name, stream in data.items()}
        save(work, model, opts, {"step": step, "tokens": tokens, "seconds": seconds, "drawn": drawn})

    last, saved, loss_sum, loss_steps = time.monotonic(), seconds, 0.0, 0
    with (work / "curve.jsonl").open("a", encoding="utf-8") as curve:
        while True:
            progress = step / arguments.steps if arguments.steps else seconds / (60 * arguments.minutes)
            if progress >= 1 or (arguments.stop_at is not None and step >= arguments.stop_at):
                break
            rng = np.random.default_rng([arguments.seed, step])
            picked = rng.choice(len(names), size=arguments.batch, p=shares(progress, names))
            rows = np.stack([data[names[source]].next() for source in picked])
            ids_BT = torch.from_numpy(rows[rank::world]).to(device)
            weights = cast(parameters, dtype)
            states_BTD: Tensor = body(
                weights, ids_BT[:, :-1], bias_HTT, config.n_layer, config.layer_norm_epsilon
            )
            labels_N = ids_BT[:, 1:].reshape(-1)
            nll = head_loss(
                states_BTD.reshape(-1, config.hidden_size), weights["word_embeddings.weight"], labels_N
            )
            loss = nll / len(labels_N)
            loss.backward()  # type: ignore[no-untyped-call]
            seconds, mean_loss = sum_gradients(model, seconds, loss.item())
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in opts:
                for group in optimiser.param_groups:
                    group["lr"] = group["full_rate"] * rate(progress)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            now = time.monotonic()
            step, tokens, seconds, last = (
                step + 1,
                tokens + arguments.batch * arguments.length,
                seconds + min(now - last, LONGEST_STEP),
                now,
            )
            loss_sum, loss_steps = loss_sum + mean_loss, loss_steps + 1
            if rank == 0 and step % arguments.log_every == 0:
                row = {"step": step, "tokens": tokens, "seconds": round(seconds, 1), "loss": round(loss_sum / loss_steps, 4),
                       "rate": round(rate(progress), 4), "norm": round(norm.item(), 3)}  # fmt: skip
                curve.write(json.dumps(row) + "\n")
                curve.flush()
                loss_sum, loss_steps = 0.0, 0
            if rank == 0 and seconds - saved > 60 * arguments.save_minutes:
                checkpoint()
                saved = seconds
    if rank == 0:
        checkpoint()
    return model


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tokens", type=Path, required=True, help="what prepare.py wrote")
    made.add_argument("--work", type=Path, required=True, help="checkpoint, curve and weights go here")
    made.add_argument("--from-weights", type=Path, help="go on from these weights instead of random ones")
    made.add_argument("--config", type=Path, default=Path("src/softprompt/base/builtin/config.json"))
    made.add_argument("--minutes", type=float, default=90.0, help="budget of training time")
    made.add_argument("--steps", type=int, help="budget in steps instead; makes a run repeatable bit for bit")
    made.add_argument("--stop-at", type=int, help="stop early at this step, as a kill would")
    made.add_argument("--batch", type=int, default=32)
    made.add_argument("--length", type=int, default=256)
    made.add_argument("--muon-rate", type=float, default=2e-3)
    made.add_argument("--adam-rate", type=float, default=1.5e-3)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    made.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    made.add_argument("--save-minutes", type=float, default=5.0)
    made.add_argument("--log-every", type=int, default=20)
    return made


if __name__ == "__main__":
    train(parser().parse_args())
