"""A run's figures to other programs, for those who use them: TensorBoard, trackio, Weights & Biases. None by default."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from softprompt.errors import MissingExtra
from softprompt.progress.events import Event, Stepped, Validated
from softprompt.tuning.recipe import Recipe


class Tracker(Protocol):
    """Takes figures by name at a step, and is closed at the end."""

    def log(self, figures: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def figures(event: Event) -> tuple[int, dict[str, float]] | None:
    """The figures that a tracker gets for an event: the step, and values by name."""
    match event:
        case Stepped():
            return event.step, {"training/nll": event.nll, "training/learning_rate": event.learning_rate}
        case Validated():
            values = {"held_out/nll": event.nll}
            return event.step, values if event.score != event.score else values | {
                "held_out/score": event.score
            }
    return None


class TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir runs`."""

    def __init__(self, recipe: Recipe) -> None:
        _need("tensorboard", "tensorboard")
        self._writer: Any = import_module("torch.utils.tensorboard").SummaryWriter(
            str(Path(recipe.out) / "tensorboard")
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Remote:
    """trackio or wandb, which share an interface; the project is the folder that holds the run."""

    def __init__(self, package: str, recipe: Recipe) -> None:
        _need(package, package)
        out = Path(recipe.out).resolve()
        self._package: Any = import_module(package)
        self._package.init(project=out.parent.name or "softprompt", name=out.name, config=recipe.model_dump())

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._package.log(dict(figures), step=step)

    def close(self) -> None:
        self._package.finish()


def _need(module: str, package: str) -> None:
    try:
        import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"tune.trackers names {package}, which is not installed: pip install {package}."
        ) from error


TRACKERS: Mapping[str, Callable[[Recipe], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": lambda recipe: Remote("trackio", recipe),
    "wandb": lambda recipe: Remote("wandb", recipe),
}
