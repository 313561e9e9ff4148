"""The texts and prompts that a recipe names to start from, and how many virtual tokens they make."""

from __future__ import annotations

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.outline import Outline
from softprompt.base.rotary import rotary_of
from softprompt.data.tokenizer import special_tokens_of
from softprompt.errors import RecipeError
from softprompt.prompt.soft_prompt import Prompt, SoftPrompt
from softprompt.store.artifact import load_prompt
from softprompt.tuning.recipe import Recipe

LENGTH = 20  # Lester et al. 2021: little is gained beyond 20 vectors


def natural_length(recipe: Recipe, lm: FrozenLM | Outline) -> int:
    """The number of vectors of the prompt's starting point."""
    prompt = recipe.prompt
    if prompt.init_from and prompt.init in ("auto", "prompt", "mean", "concatenation"):
        lengths = [start.length for start in read_prompts(recipe, lm)]
        return sum(lengths) if prompt.init == "concatenation" else lengths[0]
    return len(start_ids(lm, prompt.init_text)) if prompt.init_text else LENGTH


def read_prompts(recipe: Recipe, lm: FrozenLM | Outline) -> list[Prompt]:
    """The prompts that `prompt.init_from` names. Raises WrongBase, DamagedPrompt, or RecipeError for an unfit kind."""
    prompts = [load_prompt(path, base=lm.fingerprint) for path in recipe.prompt.init_from]
    for path, prompt in zip(recipe.prompt.init_from, prompts, strict=True):
        if recipe.prompt.kind == "soft" and not isinstance(prompt, SoftPrompt):
            raise RecipeError(
                f"prompt.init_from: {path} is a deep prompt, which has no vectors. Set prompt.kind to deep."
            )
        if isinstance(prompt, SoftPrompt) or len(prompts) == 1:
            continue
        if recipe.prompt.init == "concatenation":
            # An outline has no weights to try: the start itself refuses then.
            if isinstance(lm, FrozenLM) and rotary_of(lm) is None:
                raise RecipeError(
                    f"prompt.init_from: {path} is a deep prompt, whose keys belong to their positions, and {lm.name} has no "
                    "rotary positions by which they could be turned to others. Concatenate soft prompts, or take the mean "
                    "of deep ones of one length."
                )
        elif prompt.length != prompts[0].length:
            raise RecipeError(
                f"prompt.init_from: {path} is a deep prompt of {prompt.length} positions, and the first has "
                f"{prompts[0].length}. A mean of deep prompts is of keys at the same positions: give prompts of one length."
            )
    return prompts


def start_ids(lm: FrozenLM | Outline, text: str) -> list[int]:
    """The text as the base wants any text to begin: behind a start token (BOS) where its tokenizer puts one."""
    return [*special_tokens_of(lm.tokenizer).before, *text_ids(lm, text)]


def text_ids(lm: FrozenLM | Outline, text: str) -> list[int]:
    ids: list[int] = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise RecipeError(f"prompt.init_text: found {text!r}, which has no token. Give some text.")
    return ids
