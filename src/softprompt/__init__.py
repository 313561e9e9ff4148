"""softprompt: learn, measure, keep and serve soft prompts on one frozen language model."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Where each public name is defined; it is imported when first asked for, so that `import softprompt` loads no torch.
# `tune` is not among them, since softprompt.tune is the package: from softprompt.tuning.loop import tune.
_HOMES = {
    "CompiledPrompt": "softprompt.inference.compiled",
    "DecodeSettings": "softprompt.inference.settings",
    "DeepPrompt": "softprompt.prompt.soft_prompt",
    "Example": "softprompt.data.example",
    "FrozenLM": "softprompt.base.frozen_lm",
    "Recipe": "softprompt.tuning.recipe",
    "SoftPrompt": "softprompt.prompt.soft_prompt",
    "SoftPromptError": "softprompt.errors",
    "Template": "softprompt.data.template",
    "TextPrompt": "softprompt.inference.compiled",
    "compile_prompt": "softprompt.inference.compiled",
    "generate": "softprompt.inference.generate",
    "load_prompt": "softprompt.store.artifact",
    "load_splits": "softprompt.data.source",
    "save_prompt": "softprompt.store.artifact",
}

__all__ = [
    "CompiledPrompt",
    "DecodeSettings",
    "DeepPrompt",
    "Example",
    "FrozenLM",
    "Recipe",
    "SoftPrompt",
    "SoftPromptError",
    "Template",
    "TextPrompt",
    "__version__",
    "compile_prompt",
    "generate",
    "load_prompt",
    "load_splits",
    "save_prompt",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("softprompt")
        except PackageNotFoundError:  # run from a source tree that was never installed
            return "0+unknown"
    if name not in _HOMES:
        raise AttributeError(f"module 'softprompt' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
