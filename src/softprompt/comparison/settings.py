"""Settings of a comparison: each one is declared once, for Python, YAML and the command line. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, TypeAlias

from pydantic import Field, model_validator

from softprompt.comparison.arm import ARMS, ArmName
from softprompt.errors import DataError, RecipeError, SoftPromptError, did_you_mean
from softprompt.evaluation.record import read_json
from softprompt.evaluation.settings import Count, JudgeSettings, NotNegative
from softprompt.settings.section import setting
from softprompt.store.plain_file import read_text
from softprompt.tuning.recipe import Recipe

Positive: TypeAlias = Annotated[float, Field(gt=0)]

RENAMED = {"limit": "judge_rows", "calibrated": "calibrate", "general_text": "general"}  # since version 0.1


class CompareSettings(JudgeSettings):
    """The arms and the seeds to compare; how they are judged is declared in JudgeSettings.

    The recipe says what is learned, from which data, in how many steps; every learned arm takes those steps, or as many
    as `seconds` allow at its own pace.
    """

    arms: list[ArmName] = setting(
        ["base", "wording", "few-shot", "soft"], f"Some of {', '.join(ARMS)}.", flag="--arms", min_length=1
    )
    seeds: Annotated[int, Field(ge=1, le=1_000)] = setting(
        3, "Runs of every arm that a seed changes.", flag="--seeds"
    )
    text: str | None = setting(None, "The arm prompt: your own text in front of every input.", flag="--text")
    text_file: str | None = setting(None, "The same from a file.", flag="--text-file")
    within: NotNegative = setting(
        0.02,
        "The margin of equivalence: arms that are known to be at most so much worse than the best count as level with it "
        "(on a scale of 0 to 1; hundredfold for bleu and chrf).",
        flag="--within",
    )
    wordings: list[str] = setting(
        [],
        "The arm wording: templates that the base alone is tried under, beside a few that are made from the fields.",
        flag="--wording",
    )
    shots: Count = setting(
        4, "Examples in front: the arm few-shot, and context and distil without --context.", flag="--shots"
    )
    document: str | None = setting(
        None,
        "The arms context and distil: a file with the long text, such as an instruction or a handbook; without it, "
        "`shots` examples from the training rows.",
        flag="--context",
    )
    seconds: Positive | None = setting(
        None,
        "Learn for about this long in place of the recipe's steps, each arm at its own pace.",
        flag="--seconds",
    )
    rates: dict[ArmName, Positive] = setting({}, "An arm's learning rate, ARM=RATE.", flag="--rate")
    general: str | None = setting(
        None,
        "A file of held-out general text, to measure forgetting; without it, a bundled one.",
        flag="--general",
    )

    @model_validator(mode="after")
    def _arms_agree(self) -> Self:
        for arm in (*self.arms, *self.rates):
            if arm not in ARMS:
                raise ValueError(
                    f"--arms: found {arm!r}, wanted some of {', '.join(ARMS)}.{did_you_mean(arm, list(ARMS))}"
                )
        if len(set(self.arms)) != len(self.arms):
            raise ValueError("--arms: name each arm once.")
        if self.text is not None and self.text_file is not None:
            raise ValueError("--text and --text-file are both given. Keep one.")
        if "prompt" in self.arms and not self.text and self.text_file is None:
            raise ValueError('The arm prompt judges a text of your own. Give it with --text "...".')
        if "prompt" not in self.arms and (self.text or self.text_file is not None):
            raise ValueError("--text is given, but the arm prompt is not among --arms. Add it.")
        if self.document is not None and not {"context", "distil"} & set(self.arms):
            raise ValueError("--context is given, but neither context nor distil is among --arms. Add one.")
        return self

    def settled_text(self) -> CompareSettings:
        """The same with the file's text in place of the file. Raises RecipeError where it cannot be read."""
        if self.text_file is None:
            return self
        try:
            text = read_text(Path(self.text_file))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"--text-file {self.text_file}: cannot be read ({error}). Give a UTF-8 text file."
            ) from None
        return self.model_copy(update={"text": text, "text_file": None})

    def seeds_of(self, arm: str) -> range:
        """The seeds that an arm is run with."""
        return range(self.seeds if ARMS[arm].seeded else 1)

    @property
    def job_names(self) -> list[str]:
        """Every arm with every seed, in the order in which they run."""
        return [job_name(arm, seed) for arm in self.arms for seed in self.seeds_of(arm)]

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """Settings from a record, of version 0.1 too; what this version does not know is left out.

        Raises DataError."""
        values = {RENAMED.get(name, name): value for name, value in record.items()}
        try:
            return cls(**{name: value for name, value in values.items() if name in cls.model_fields})
        except SoftPromptError as error:
            raise DataError(f"The recorded settings cannot be read: {error}") from None


def job_name(arm: str, seed: int) -> str:
    """An arm with one seed, as its folder is called."""
    return f"{arm}-{seed}"


@dataclass(frozen=True)
class Job:
    """One arm with one seed: what a process is given to do, in `folder`."""

    recipe: Recipe
    settings: CompareSettings
    arm: str
    seed: int
    folder: Path

    @property
    def digest(self) -> str:
        """Stands for all that this arm's result depends on; other arms and seeds are not part of it."""
        values = self.settings.model_dump(exclude={"arms", "seeds", "within"})
        long_text = ("context", "distil")
        for name, arms in {
            "text": ("prompt",),
            "shots": ("few-shot", *long_text),
            "wordings": ("wording",),
            "document": long_text,
        }.items():
            if self.arm not in arms:
                del values[name]
        values["rates"] = values["rates"].get(self.arm)
        values["recipe"] = self.recipe.model_dump() | {"out": ""}
        return hashlib.sha256(json.dumps([self.arm, self.seed, values], sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The settings as JSON, in the form that `load` reads."""
        tree = {"recipe": self.recipe.model_dump(), "settings": self.settings.model_dump()}
        return json.dumps({**tree, "arm": self.arm, "seed": self.seed}, indent=1)

    @classmethod
    def load(cls, folder: Path) -> Job:
        """The job that `folder`/job.json holds. Raises DataError, RecipeError."""
        record = read_json(folder / "job.json")
        try:
            recipe = record.get("recipe") or record["settings"]["recipe"]
            settings = CompareSettings.of_record(record["settings"])
            return cls(Recipe(**recipe), settings, str(record["arm"]), int(record["seed"]), folder)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{folder / 'job.json'}: cannot be read ({error}). Delete the folder and compare again."
            ) from None
