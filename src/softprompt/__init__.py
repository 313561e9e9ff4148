"""softprompt: learn, distil, measure, keep and serve soft prompts on one frozen language model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see; at run time a name is imported when it is first used
    from softprompt.base.frozen_lm import FrozenLM
    from softprompt.comparison.compare import compare
    from softprompt.comparison.records import Comparison
    from softprompt.comparison.settings import CompareSettings
    from softprompt.data.example import Example, Message, Splits
    from softprompt.data.preview import Preview
    from softprompt.data.source import load_splits
    from softprompt.data.template import Template
    from softprompt.errors import (
        BaseError,
        ClusterError,
        DamagedPrompt,
        DataError,
        GateFailed,
        MissingExtra,
        NotFinite,
        OutOfMemory,
        PromptError,
        RecipeError,
        SaveError,
        SoftPromptError,
        WrongBase,
    )
    from softprompt.evaluation.evaluate import Evaluation
    from softprompt.evaluation.judge import evaluate
    from softprompt.evaluation.settings import JudgeSettings
    from softprompt.inference.compiled import CompiledPrompt, TextPrompt, compile_prompt
    from softprompt.inference.conversation import Conversation
    from softprompt.inference.generate import Generation, generate
    from softprompt.inference.generate_file import FileAnswers, generate_file
    from softprompt.inference.score import Scored, score
    from softprompt.inference.settings import DecodeSettings
    from softprompt.loss.fast import FastLoss
    from softprompt.prompt.soft_prompt import DeepPrompt, Prompt, SoftPrompt
    from softprompt.scale.ray_server import RayServer
    from softprompt.scale.ray_workers import RayWorkers
    from softprompt.serving.settings import ServeSettings
    from softprompt.store.artifact import load_prompt, save_prompt
    from softprompt.store.library import Library
    from softprompt.tuning.distil import DistilResult, distil
    from softprompt.tuning.distil_settings import DistilSettings
    from softprompt.tuning.loop import tune
    from softprompt.tuning.preview import preview
    from softprompt.tuning.recipe import Data, PromptSettings, Recipe, TuneSettings
    from softprompt.tuning.result import TuneResult
    from softprompt.tuning.sweep import SweepResult, sweep
    from softprompt.tuning.together import tune_tasks, tune_together

    __version__: str

_HOMES = {
    "base.frozen_lm": ("FrozenLM",),
    "comparison.compare": ("compare",),
    "comparison.records": ("Comparison",),
    "comparison.settings": ("CompareSettings",),
    "data.example": ("Example", "Message", "Splits"),
    "data.preview": ("Preview",),
    "data.source": ("load_splits",),
    "data.template": ("Template",),
    "errors": (
        "BaseError",
        "ClusterError",
        "DamagedPrompt",
        "DataError",
        "GateFailed",
        "MissingExtra",
        "NotFinite",
        "OutOfMemory",
        "PromptError",
        "RecipeError",
        "SaveError",
        "SoftPromptError",
        "WrongBase",
    ),
    "evaluation.judge": ("evaluate",),
    "evaluation.evaluate": ("Evaluation",),
    "evaluation.settings": ("JudgeSettings",),
    "inference.compiled": ("CompiledPrompt", "TextPrompt", "compile_prompt"),
    "inference.conversation": ("Conversation",),
    "inference.generate": ("Generation", "generate"),
    "inference.generate_file": ("FileAnswers", "generate_file"),
    "inference.score": ("Scored", "score"),
    "inference.settings": ("DecodeSettings",),
    "loss.fast": ("FastLoss",),
    "prompt.soft_prompt": ("DeepPrompt", "Prompt", "SoftPrompt"),
    "scale.ray_server": ("RayServer",),
    "scale.ray_workers": ("RayWorkers",),
    "serving.settings": ("ServeSettings",),
    "store.artifact": ("load_prompt", "save_prompt"),
    "store.library": ("Library",),
    "tuning.distil": ("DistilResult", "distil"),
    "tuning.distil_settings": ("DistilSettings",),
    "tuning.loop": ("tune",),
    "tuning.preview": ("preview",),
    "tuning.recipe": ("Data", "PromptSettings", "Recipe", "TuneSettings"),
    "tuning.result": ("TuneResult",),
    "tuning.sweep": ("SweepResult", "sweep"),
    "tuning.together": ("tune_tasks", "tune_together"),
}
"""Where each public name is defined. `import softprompt` loads none of these, so no torch either."""

_HOME_OF = {name: f"softprompt.{home}" for home, names in _HOMES.items() for name in names}

__all__ = [
    "BaseError",
    "ClusterError",
    "CompareSettings",
    "Comparison",
    "CompiledPrompt",
    "Conversation",
    "DamagedPrompt",
    "Data",
    "DataError",
    "DecodeSettings",
    "DeepPrompt",
    "DistilResult",
    "DistilSettings",
    "Evaluation",
    "Example",
    "FastLoss",
    "FileAnswers",
    "FrozenLM",
    "GateFailed",
    "Generation",
    "JudgeSettings",
    "Library",
    "Message",
    "MissingExtra",
    "NotFinite",
    "OutOfMemory",
    "Preview",
    "Prompt",
    "PromptError",
    "PromptSettings",
    "RayServer",
    "RayWorkers",
    "Recipe",
    "RecipeError",
    "SaveError",
    "Scored",
    "ServeSettings",
    "SoftPrompt",
    "SoftPromptError",
    "Splits",
    "SweepResult",
    "Template",
    "TextPrompt",
    "TuneResult",
    "TuneSettings",
    "WrongBase",
    "__version__",
    "compare",
    "compile_prompt",
    "distil",
    "evaluate",
    "generate",
    "generate_file",
    "load_prompt",
    "load_splits",
    "preview",
    "save_prompt",
    "score",
    "sweep",
    "tune",
    "tune_tasks",
    "tune_together",
]


if not TYPE_CHECKING:  # else a checker would take every misspelt name for one of these

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import PackageNotFoundError, version

            try:
                return version("softprompt")
            except PackageNotFoundError:  # run from a source tree that was never installed
                return "0+unknown"
        if name not in _HOME_OF:
            raise AttributeError(f"module 'softprompt' has no attribute {name!r}")
        return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
