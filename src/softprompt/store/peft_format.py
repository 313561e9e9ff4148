"""PEFT's file format, and the one decision whether PEFT would read a prompt rightly.

PEFT puts a prompt before everything else, knows no template, and is given the text up to where the answer starts. So
adapter_config.json, by which PEFT finds a prompt, is a promise: it is written, and the model card and `export --to
peft` speak of PEFT, only where that gives what softprompt gives. Format: PEFT 0.21's save_pretrained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from softprompt.data.template import Field, Soft, Template, Text
from softprompt.errors import PromptError, RecipeError
from softprompt.prompt.soft_prompt import Prompt, SoftPrompt
from softprompt.store.schema import PeftConfig

SHALLOW = {"PROMPT_TUNING", "P_TUNING", "CPT"}
DEEP = {"PREFIX_TUNING", "CARTRIDGE"}


@dataclass(frozen=True)
class PlainReading:
    """Training as seen by a program that gets a row under `template` as plain text; kept in a prompt's notes.

    `same_text`: its tokenizer gives the ids that were trained. `same_end`: the base's own generate stops at the token that
    answers end with."""

    template: str
    same_text: bool
    same_end: bool


def why_not_peft(prompt: Prompt) -> str | None:
    """The reason why PEFT would read this prompt wrongly; None where it reads it correctly.

    Where the prompt's notes do not say how its rows were read, only what is right on every base passes."""
    try:
        template = Template.parse(prompt.template or "{text}", target=prompt.target, length=prompt.length)
    except RecipeError:
        return "its template cannot be read"
    pieces = list(template.pieces)
    slots = [index for index, piece in enumerate(pieces) if isinstance(piece, Soft)]
    # A deep prompt's keys and values come before all text, wherever its slot is.
    if isinstance(prompt, SoftPrompt) and slots != [0]:
        return "PEFT puts a prompt before everything else"
    pieces = [piece for piece in pieces if not isinstance(piece, Soft)]
    reading = _plain_reading(prompt)
    if template.chat and len(pieces) > 1:
        return "PEFT knows no text around a chat"
    if prompt.target is None and not template.chat:
        return None
    target_at = len(pieces) if template.chat else pieces.index(Field(prompt.target or ""))
    if target_at + 1 < len(pieces) and not (reading and reading.same_end):
        return "PEFT knows no text after the answer and would generate past it"
    if reading and not reading.same_end:
        return "the base does not stop at the token that answers end with, so PEFT would generate past it"
    before = pieces[target_at - 1] if target_at else None
    if reading.same_text if reading else not (isinstance(before, Text) and before.text[-1:].isspace()):
        return None
    # Here white space before the target is read as part of the answer's first token. PEFT's user gives it with the
    # text, where it becomes a separate token that the prompt never saw.
    return "white space before the answer would reach PEFT as a separate token"


def text_for_peft(prompt: Prompt) -> str:
    """The text that PEFT's user writes, as a template: all that follows the slot, up to the answer."""
    template = Template.parse(prompt.template or "{text}", target=prompt.target, length=prompt.length)
    if template.chat:
        return "tokenizer.apply_chat_template(messages, add_generation_prompt=True)"
    target = Field(prompt.target or "")
    before = takewhile(lambda piece: piece != target, template.pieces)
    return str(Template(tuple(piece for piece in before if not isinstance(piece, Soft))))


def _plain_reading(prompt: Prompt) -> PlainReading | None:
    """The note of training, if it is about this template; notes may come from anyone."""
    note = prompt.notes.get("plain_reading")
    if not isinstance(note, Mapping) or note.get("template") != prompt.template:
        return None
    return PlainReading(prompt.template, note.get("same_text") is True, note.get("same_end") is True)


def peft_config(prompt: Prompt) -> dict[str, Any]:
    """The content of adapter_config.json."""
    common = {
        "auto_mapping": None,
        "base_model_name_or_path": prompt.base.name,
        "revision": prompt.base.revision,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "modules_to_save": None,
        "num_virtual_tokens": prompt.length,
        "num_transformer_submodules": 1,
        "num_layers": prompt.base.layers,
    }
    if isinstance(prompt, SoftPrompt):
        return common | {
            "peft_type": "PROMPT_TUNING",
            "token_dim": prompt.embeddings_PD.shape[1],
            "num_attention_heads": prompt.base.kv_heads or 1,
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "tokenizer_name_or_path": prompt.base.name,
            "tokenizer_kwargs": None,
        }
    layers, _, heads, head_width = prompt.keys_LPHK.shape
    return common | {
        "peft_type": "PREFIX_TUNING",
        "token_dim": heads * head_width,
        "num_attention_heads": heads,
        "num_layers": layers,
        "encoder_hidden_size": heads * head_width,
        "prefix_projection": False,
    }


def check_readable(config: PeftConfig, folder: Path) -> None:
    """Raises PromptError for an adapter that is no prompt for a causal model, or that holds more than a prompt."""
    kind = config.peft_type
    if kind == "MULTITASK_PROMPT_TUNING":
        raise PromptError(
            f"{folder}: a multitask prompt holds one prompt a task. Save the task's own prompt from PEFT "
            "(get_prompt with its task id), then load that."
        )
    if kind not in SHALLOW | DEEP:
        raise PromptError(
            f"{folder}: found a PEFT adapter of type {kind}, wanted one of {', '.join(sorted(SHALLOW | DEEP))}."
        )
    if config.task_type not in (None, "CAUSAL_LM"):
        raise PromptError(
            f"{folder}: found a PEFT prompt of task type {config.task_type}, wanted CAUSAL_LM. What it answers comes "
            "from a head or an encoder that softprompt does not have. Use it with PEFT."
        )
    if config.num_transformer_submodules not in (None, 1):
        raise PromptError(f"{folder}: was made for an encoder-decoder; softprompt uses causal models alone.")
    if config.modules_to_save:
        raise PromptError(
            f"{folder}: also changes the base's modules {', '.join(config.modules_to_save)} (modules_to_save), and "
            "softprompt never changes a base. Use it with PEFT."
        )
