"""A prompt merged into a copy of its base as added tokens, for tools that know nothing of soft prompts.

The copy has one more token for each vector. Where the prompt was learned in the base's chat template, the copy's chat
template writes them; else, where its slot is in front of a text, the tokenizer adds them to every text. Anywhere else they
have to be written into the text, as softprompt_merged.json says. The output layer gives them zero and the generation config suppresses them, so
what is generated is what the prompt gives. The base itself is not changed.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors
import torch
from tokenizers.processors import Sequence as Processors
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from softprompt.base.foreign import quiet
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.quantised import is_quantised
from softprompt.data.template import Soft
from softprompt.errors import BaseError, PromptError, SaveError
from softprompt.export.chat_copy import chat_copy, written
from softprompt.inference.compiled import compile_prompt
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.store.atomic import new_folder, replace_file
from softprompt.store.card import last_part
from softprompt.store.ownership import claim, folder_named, is_merged, remove_ours

RECORD = "softprompt_merged.json"


def merge_prompt(
    lm: FrozenLM, prompt: SoftPrompt, folder: str | Path, *, overwrite: bool = False
) -> list[str]:
    """Saves the merged copy in `folder` as transformers saves a model; gives the added tokens, in order.

    The folder is new or empty, or with `overwrite` an earlier merged copy. Raises SaveError for any other, WrongBase for
    another base's prompt, PromptError for one that cannot be tokens, BaseError as loading does.
    """
    folder = free_folder(folder, overwrite)
    compiled = compile_prompt(lm, prompt)
    layout, ending = compiled.template, compiled.ending
    names = token_names(prompt)
    taken = sorted(set(names) & set(lm.tokenizer.get_vocab()))
    if taken:
        raise PromptError(
            f"{prompt.name}: the base has a token {taken[0]} already. Give the prompt another name."
        )
    in_chat = chat_copy(layout, names, lm.tokenizer)
    starts = layout.pieces[0] == Soft(prompt.length) and in_chat is None
    tokenizer, added = with_tokens(lm.tokenizer, names, before_every_text=starts)
    if in_chat is not None:
        tokenizer.chat_template = in_chat.chat_template
    record = {
        "prompt": prompt.name,
        "base": last_part(prompt.base.name),
        "template": str(layout),
        "tokens": names,
        "before_every_text": starts,
        "in_chat_template": in_chat is not None,
        "message": None if in_chat is None else in_chat.message,
        "text": None if layout.chat or starts else written(layout, names),
        "stop": list(ending.stop),
    }
    write_copy(folder, with_rows(lm, prompt.embeddings_PD, added, ending.ids), tokenizer, record)
    return names


def write_copy(folder: Path, model: Any, tokenizer: Any, record: dict[str, Any]) -> None:
    """Publishes a merged copy of a base as a whole folder, in place of an earlier copy of ours. Raises SaveError."""
    try:
        with new_folder(folder) as draft:
            claim(draft, "merged", [])  # the whole folder is ours
            with quiet():
                model.save_pretrained(draft)
                tokenizer.save_pretrained(draft)
            replace_file(draft / RECORD, json.dumps(record, indent=2) + "\n")
            if folder.exists() and any(folder.iterdir()):
                remove_ours(folder, "merged", RECORD)
    except (OSError, safetensors.SafetensorError) as error:
        if isinstance(error, SaveError):
            raise
        raise SaveError(
            f"{folder}: could not be written ({getattr(error, 'strerror', None) or error}). Free some space or choose "
            "another folder."
        ) from error


def token_names(prompt: SoftPrompt) -> list[str]:
    """The tokens that stand for a prompt's vectors."""
    stem = re.sub(r"[^\w.-]+", "-", prompt.name) or "prompt"
    return [f"<|{stem}-{row}|>" for row in range(prompt.length)]


def free_folder(folder: str | Path, overwrite: bool) -> Path:
    """The folder, new or empty, or an earlier merged copy that may be replaced. Raises SaveError."""
    folder = folder_named(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise SaveError(f"{folder}: is not a folder. Choose another path.")
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    if not is_merged(folder):
        raise SaveError(
            f"{folder}: holds files that softprompt did not write as a merged model, and a merged model takes a whole "
            "folder. Choose a new one."
        )
    if not overwrite:
        raise SaveError(
            f"{folder}: holds a merged model of softprompt. Pass overwrite=True (--overwrite) to replace it, or choose "
            "another folder."
        )
    return folder


def with_tokens(tokenizer: Any, names: list[str], *, before_every_text: bool) -> tuple[Any, list[int]]:
    """A copy of the tokenizer with the tokens `names`, and their ids. Raises PromptError for one that is not fast."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise PromptError("The base's tokenizer is not a fast one, so tokens cannot be merged into it.")
    settings = {
        name: str(getattr(tokenizer, name))
        for name in (
            "bos_token",
            "eos_token",
            "pad_token",
            "unk_token",
            "sep_token",
            "cls_token",
            "mask_token",
        )
        if getattr(tokenizer, name, None) is not None
    }
    grown: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer),
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        clean_up_tokenization_spaces=False,
        **settings,
    )
    if getattr(tokenizer, "chat_template", None):
        grown.chat_template = tokenizer.chat_template
    grown.add_special_tokens({"additional_special_tokens": names})
    ids = [int(grown.convert_tokens_to_ids(name)) for name in names]
    if before_every_text:
        ours = TemplateProcessing(
            single=[*names, "$A"],
            pair=[*names, "$A", "$B"],
            special_tokens=list(zip(names, ids, strict=True)),
        )
        processor = grown.backend_tokenizer.post_processor
        grown.backend_tokenizer.post_processor = (
            Processors([processor, ours]) if processor is not None else ours
        )
    return grown, ids


def with_rows(
    lm: FrozenLM,
    vectors_PD: Tensor,
    ids: list[int],
    end_ids: Iterable[int],
    *,
    like: int | None = None,
) -> Any:
    """A copy of the model with the vectors as rows `ids` of its embedding table; its output layer is apart from it, and
    generation stops where answers were learned to end.

    In the output layer the new rows are zero, or `like` that of another token."""
    if is_quantised(lm.model):
        raise BaseError(
            f"{lm.name}: its weights are quantised ({lm.dtype_reason}), and a copy of the base with more tokens is written in full. "
            "Export the prompt to peft or vectors, or learn it on the base in full."
        )
    model = copy.deepcopy(lm.model)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    # Not all bases store what their layer returns: some scale a row when they look it up.
    scale = float(
        (lm.embed(torch.tensor([1], device=lm.device)).float().norm() / table.weight[1].float().norm()).item()
    )
    rows_PD = (vectors_PD / scale).to(lm.device, table.weight.dtype)
    size = max(lm.vocab_size, *(token + 1 for token in ids))
    # The table grows by the vectors, which are then read as tokens with these ids.
    weight_VD = table.weight.data.new_zeros(size, lm.width)
    weight_VD[: lm.vocab_size] = table.weight.data
    weight_VD[ids] = rows_PD
    table.weight = nn.Parameter(weight_VD, requires_grad=False)
    table.num_embeddings = size
    # The output layer needs as many rows; zeros there, and suppressed below, so that the new tokens are never generated.
    out_VD = head.weight.data.new_zeros(size, head.weight.shape[1])
    out_VD[: len(head.weight)] = head.weight.data
    out_VD[ids] = (
        0 if like is None else head.weight.data[like]
    )  # they may lie in the padding that some bases have behind their vocabulary
    head.weight = nn.Parameter(out_VD, requires_grad=False)
    head.out_features = size
    if getattr(head, "bias", None) is not None:
        bias_V = head.bias.data.new_zeros(size)
        bias_V[: len(head.bias)] = head.bias.data
        bias_V[ids] = 0 if like is None else head.bias.data[like]
        head.bias = nn.Parameter(bias_V, requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.vocab_size = size
        config.tie_word_embeddings = False
    if ends := sorted(end_ids):  # what the prompt learned to end with need not be the base's own end token
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.generation_config.suppress_tokens = sorted({*(model.generation_config.suppress_tokens or []), *ids})
    return model
