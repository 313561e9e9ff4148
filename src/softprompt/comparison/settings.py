"""What a comparison is asked to do, declared once. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from softprompt.data.template import did_you_mean
from softprompt.errors import RecipeError
from softprompt.tuning.recipe import Recipe

ARM_NAMES: Mapping[str, str] = {
    "base": "the base as it is",
    "prompt": "your own text in front",
    "few-shot": "examples from the training rows in front",
    "soft": "a soft prompt",
    "deep": "a deep prompt: keys and values for every layer",
    "lora": "low-rank updates of the weights (PEFT)",
    "full": "a full copy of the weights, fine-tuned",
}
DRAWN = ("few-shot", "soft", "deep", "lora", "full")
"""Arms that a seed changes; the others are run once."""

LEARNED = ("soft", "deep", "lora", "full")

# Without a rate of one's own. Soft and deep prompts take the recipe's, or derive one from the embeddings' scale.
DEFAULT_RATES: Mapping[str, float] = {"lora": 2e-3, "full": 3e-4}


@dataclass(frozen=True)
class Settings:
    """One comparison.

    `recipe` says what is learned, from which data, in how many steps; every learned arm takes those steps, or as many
    as `seconds` allow at its own pace. `rates` are learning rates by arm. `limit` bounds the judged rows.
    """

    recipe: Recipe
    arms: tuple[str, ...] = ("base", "few-shot", "soft")
    seeds: int = 1
    metrics: tuple[str, ...] = ()
    text: str | None = None
    shots: int = 4
    limit: int | None = None
    answers: Literal["generate", "rank"] = "generate"
    calibrated: bool = False
    seconds: float | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    general_text: str | None = None
    batch_rows: int = 16

    def __post_init__(self) -> None:
        for arm in (*self.arms, *self.rates):
            if arm not in ARM_NAMES:
                raise RecipeError(
                    f"--arms: found {arm!r}, wanted some of {', '.join(ARM_NAMES)}."
                    f"{did_you_mean(arm, list(ARM_NAMES))}"
                )
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise RecipeError("--arms: name at least one arm, and each once.")
        if "prompt" in self.arms and not self.text:
            raise RecipeError('The arm prompt judges a text of your own. Give it with --text "...".')
        if "prompt" not in self.arms and self.text:
            raise RecipeError("--text is given, but the arm prompt is not among --arms. Add it.")
        if self.seeds < 1 or self.shots < 1:
            raise RecipeError("--seeds and --shots are at least 1.")
        if self.calibrated and self.answers != "rank":
            raise RecipeError("--calibrate weighs ranked labels. Add --answers rank.")

    def seeds_of(self, arm: str) -> range:
        """The seeds that an arm is run with."""
        return range(self.seeds if arm in DRAWN else 1)

    def to_record(self) -> dict[str, Any]:
        """Plain data that `from_record` reads back."""
        values = {key: value for key, value in vars(self).items() if key != "recipe"}
        return {**values, "rates": dict(self.rates), "recipe": self.recipe.model_dump()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Settings:
        """What `to_record` wrote, from JSON too."""
        values = dict(record)
        values["recipe"] = Recipe(**values["recipe"])
        values["arms"], values["metrics"] = tuple(values["arms"]), tuple(values["metrics"])
        return cls(**values)


@dataclass(frozen=True)
class Job:
    """One arm with one seed: what a process is given to do, in `folder`."""

    settings: Settings
    arm: str
    seed: int
    folder: Path

    @property
    def digest(self) -> str:
        """Stands for all that this arm's result depends on; other arms and seeds are not part of it."""
        values = self.settings.to_record()
        for name in ("arms", "seeds"):
            del values[name]
        values["recipe"]["out"] = ""
        mine = {"text": "prompt", "shots": "few-shot"}
        for name, arm in mine.items():
            if arm != self.arm:
                del values[name]
        values["rates"] = values["rates"].get(self.arm)
        return hashlib.sha256(json.dumps([self.arm, self.seed, values], sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(
            {"settings": self.settings.to_record(), "arm": self.arm, "seed": self.seed}, indent=1
        )

    @classmethod
    def load(cls, folder: Path) -> Job:
        """The job that `folder`/job.json holds."""
        values = json.loads((folder / "job.json").read_text("utf-8"))
        return cls(Settings.from_record(values["settings"]), values["arm"], values["seed"], folder)
