"""A prompt merged into a copy of its base as added tokens, for tools that know nothing of soft prompts.

The copy has one more token for each vector. Its tokenizer puts them before every text by itself, where the prompt
stands at the start. The output layer gives them zero, and the generation config never lets them be said, so what is
generated is exactly what the prompt gives. The base itself is not touched.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import Sequence as Processors
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedTokenizerFast

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.template import Soft
from softprompt.errors import PromptError
from softprompt.inference.compiled import compile_prompt
from softprompt.prompt.soft_prompt import SoftPrompt


def merge_prompt(lm: FrozenLM, prompt: SoftPrompt, folder: str | Path) -> list[str]:
    """Save the merged copy in `folder` as transformers saves a model; gives the added tokens, in order.

    Raises WrongBase for another base's prompt, PromptError for one that cannot be tokens, BaseError as loading does.
    """
    layout = compile_prompt(lm, prompt).template
    names = [f"<|{prompt.name}-{row}|>" for row in range(prompt.length)]
    taken = sorted(set(names) & set(lm.tokenizer.get_vocab()))
    if taken:
        raise PromptError(
            f"{prompt.name}: the base has a token {taken[0]} already. Give the prompt another name."
        )
    starts = isinstance(layout.pieces[0], Soft) and layout.pieces[0].length == prompt.length
    tokenizer, added = _with_tokens(lm.tokenizer, names, before_every_text=starts)
    model = _with_rows(lm, prompt, added)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (Path(folder) / "softprompt_merged.json").write_text(
        json.dumps(
            {
                "prompt": prompt.name,
                "base": prompt.base.name,
                "template": str(layout),
                "tokens": names,
                "before_every_text": starts,
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )
    return names


def _with_tokens(tokenizer: Any, names: list[str], *, before_every_text: bool) -> tuple[Any, list[int]]:
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
        known = grown.backend_tokenizer.post_processor
        grown.backend_tokenizer.post_processor = Processors([known, ours]) if known is not None else ours
    return grown, ids


def _with_rows(lm: FrozenLM, prompt: SoftPrompt, ids: list[int]) -> Any:
    """A copy of the model with the vectors as rows `ids` of its embedding table; its output layer is apart from it."""
    model = copy.deepcopy(lm.model)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    # Not all bases store what their layer returns: some scale a row when they look it up.
    scale = float(
        (lm.embed(torch.tensor([1], device=lm.device)).float().norm() / table.weight[1].float().norm()).item()
    )
    rows_PD = (prompt.embeddings_PD / scale).to(lm.device, table.weight.dtype)
    size = max(lm.vocab_size, *(one + 1 for one in ids))
    weight_VD = table.weight.data.new_zeros(size, lm.width)
    weight_VD[: lm.vocab_size] = table.weight.data
    weight_VD[ids] = rows_PD
    table.weight = nn.Parameter(weight_VD, requires_grad=False)
    table.num_embeddings = size
    out_VD = head.weight.data.new_zeros(size, head.weight.shape[1])
    out_VD[: len(head.weight)] = head.weight.data
    head.weight = nn.Parameter(out_VD, requires_grad=False)
    head.out_features = size
    if getattr(head, "bias", None) is not None:
        bias_V = head.bias.data.new_zeros(size)
        bias_V[: len(head.bias)] = head.bias.data
        head.bias = nn.Parameter(bias_V, requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.vocab_size = size
        config.tie_word_embeddings = False
    model.generation_config.suppress_tokens = sorted({*(model.generation_config.suppress_tokens or []), *ids})
    return model
