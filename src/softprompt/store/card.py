"""The model card of a prompt: README.md, for people and for the hub."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from softprompt.prompt.soft_prompt import Prompt
from softprompt.store.peft_format import text_for_peft, why_not_peft


def card(prompt: Prompt) -> str:
    """A model card: what the prompt is, its base, its measurements and its use. It contains no absolute path."""
    # Imported here: only saving needs the hub's library.
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    prompt = shareable(prompt)
    base, notes, reason = prompt.base, prompt.notes, why_not_peft(prompt)
    name = _line(prompt.name) or "prompt"
    measured = {
        key: value
        for key, value in _mapping(notes.get("metrics")).items()
        if isinstance(value, float) and math.isfinite(value)
    }
    source = _line(str(_mapping(notes.get("data")).get("source") or "")) or "unknown"
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=source,
            dataset_name=source,
            metric_type=_line(key),
            metric_value=round(value, 6),
        )
        for key, value in measured.items()
    ]
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", base.name) and not base.name.startswith(".")
    head = ModelCardData(
        base_model=base.name if hub_id else None,
        library_name="softprompt",
        tags=["prompt-tuning", "soft-prompt", *([] if reason else ["peft"])],
        model_name=name,
        eval_results=results or None,
    )
    revision = f" at revision {_code(base.revision)}" if base.revision else ""
    body = [
        f"# {name}",
        f"A {prompt.kind} prompt of {prompt.length} virtual tokens for {_code(base.name)}{revision}. The base model's weights "
        "are never changed.",
        f"Its template:\n\n{_block(prompt.template or '{soft} in front of the text')}",
        f"- learned: {f'the field {_code(prompt.target)}' if prompt.target else 'all of the text'}\n"
        f"- fingerprint of the base: {_code(base.sha256 or 'unknown')}",
    ]
    if measured:
        rows = [f"| {_line(key).replace('_', ' ')} | {value:.4f} |" for key, value in measured.items()]
        body.append("\n".join(["| measured | value |", "|---|---|", *rows]))
    body.append(_block(f"softprompt generate --base {_line(base.name)} --prompt FOLDER 'some text'", "bash"))
    if reason is None:
        body.append(
            "`peft.PeftModel.from_pretrained(model, FOLDER)` loads it too. Give it the text that follows the slot, and pad "
            f"on the right:\n\n{_block(text_for_peft(prompt))}"
        )
    content = f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"
    return str(ModelCard(content, ignore_metadata_errors=False))


def shareable(prompt: Prompt) -> Prompt:
    """The prompt as it may leave this machine: absolute paths in its base's name and notes become their last part."""
    notes = {key: _without_paths(value) for key, value in prompt.notes.items()}
    return replace(prompt, base=replace(prompt.base, name=last_part(prompt.base.name)), notes=notes)


def last_part(text: str) -> str:
    """`text`, or the last part of it if it is an absolute path (or one that starts at a home folder)."""
    for kind in (PurePosixPath, PureWindowsPath):
        if "\n" not in text and (kind(text).is_absolute() or text.startswith("~")):
            return kind(text).name or "local"
    return text


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(part) for part in value]
    return last_part(value) if isinstance(value, str) else value


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _line(text: str) -> str:
    """Text as part of one line: no breaks, no control characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _code(text: str) -> str:
    """Text as a code span, whatever backticks it has."""
    line = _line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if "`" in line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _block(text: str, language: str = "text") -> str:
    """Text as a code block, whatever it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
