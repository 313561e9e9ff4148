"""Runs and generation that share one loaded base, step by step in turn, each give what they give alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.inference.generate import generate
from softprompt.inference.settings import DecodeSettings
from softprompt.progress.events import Event, Stepped
from softprompt.tuning.loop import tune
from softprompt.tuning.recipe import Recipe

DATA = {
    "source": "builtin:messages",
    "target": "label",
    "template": "Message: {text} Kind:{soft:4} {label}",  # text before the slot, so that contexts are kept
    "limit": 12,
    "validation": 6,
}
RUNS = {
    "int8 products": ["tune.int8_products=true"],
    "no kept contexts, recomputing": ["tune.context_cache_gigabytes=0", "tune.gradient_checkpointing=true"],
    "deep": ["prompt.kind=deep", "data.template={soft:4}Message: {text} Kind: {label}"],
}
TEXTS = ["my parcel is late", "thank you for the quick help"]


class Turns:
    """Lets threads go on one at a time, in a fixed round."""

    def __init__(self, names: list[str]) -> None:
        self.waiting, self.turn = list(names), threading.Condition()

    def take(self, name: str) -> None:
        with self.turn:
            self.turn.wait_for(lambda: self.waiting[0] == name, timeout=120)

    def pass_on(self, name: str, *, last: bool = False) -> None:
        with self.turn:
            self.waiting.remove(name)
            if not last:
                self.waiting.append(name)
            self.turn.notify_all()


def learned(lm: FrozenLM, name: str, out: Path, after_step: Callable[[], None]) -> tuple[torch.Tensor, ...]:
    def on_event(event: Event) -> None:
        if isinstance(event, Stepped):
            after_step()

    recipe = Recipe(out=str(out), data=DATA, tune={"epochs": 2, "batch_size": 6}).changed(RUNS[name])  # type: ignore[arg-type]
    return tune(recipe, lm=lm, on_event=on_event).prompt.plain


def written(lm: FrozenLM, after_text: Callable[[], None]) -> list[str]:
    texts = []
    for text in TEXTS * 2:
        texts.append(generate(lm, [text], None, DecodeSettings(max_new_tokens=10))[0].text)
        after_text()
    return texts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runs_of_unlike_settings_and_a_generation_on_one_base_give_what_they_give_alone(
    dtype: str, tmp_path: Path
) -> None:
    shared = FrozenLM.load("builtin", dtype=dtype, device="cpu")
    jobs: dict[str, Callable[[FrozenLM, Path, Callable[[], None]], object]] = {
        name: (lambda lm, out, after, name=name: learned(lm, name, out, after))  # type: ignore[misc]
        for name in RUNS
    }
    jobs["generation"] = lambda lm, out, after: written(lm, after)
    turns, together = Turns(list(jobs)), {}

    def work(name: str) -> None:
        turns.take(name)

        def after() -> None:
            turns.pass_on(name)
            turns.take(name)

        try:
            together[name] = jobs[name](shared, tmp_path / "together" / str(list(jobs).index(name)), after)
        finally:
            turns.pass_on(name, last=True)

    threads = [threading.Thread(target=work, args=(name,)) for name in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=240)
    for name, job in jobs.items():
        alone = job(
            FrozenLM.load("builtin", dtype=dtype, device="cpu"), tmp_path / "alone" / name, lambda: None
        )
        if name == "generation":
            assert together[name] == alone
        else:
            for one, other in zip(together[name], alone, strict=True):  # type: ignore[call-overload]
                assert torch.equal(one, other), name


def test_a_loaded_base_refuses_to_be_changed() -> None:
    lm = FrozenLM.load("builtin", device="cpu")
    with pytest.raises(AttributeError, match="a loaded base never changes"):
        lm.int8 = True
    with pytest.raises(AttributeError, match="a loaded base never changes"):
        lm.body = None
