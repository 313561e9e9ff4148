"""A soft prompt as a model of lm-evaluation-harness (extra `lmeval`), so that any of its tasks can be run under one.

    python -m softprompt.evaluation.lm_eval_model --model softprompt --model_args prompt=runs/mine --tasks TASK

is the harness's own command line with this model registered. The prompt is inserted in front of every context that the
harness makes; the prompt's own template is not used, since the harness writes the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from softprompt.base.context_length import longest_text
from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example
from softprompt.data.template import Field, Piece, Soft, Template
from softprompt.errors import DataError, MissingExtra
from softprompt.inference.compiled import CompiledPrompt, compile_prompt
from softprompt.inference.generate import DecodeSettings, generate
from softprompt.inference.score import score
from softprompt.prompt.soft_prompt import Prompt
from softprompt.store.artifact import load_prompt

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise MissingExtra(
        "lm-evaluation-harness is not installed. Run: pip install 'softprompt[lmeval]'"
    ) from error

NEW_TOKENS = 256  # where a task does not say, as the harness's own models do


@register_model("softprompt")
class SoftPromptLM(LM):  # type: ignore[misc]
    """`prompt` is a prompt's folder, or none for the base alone; `base` is its own base unless another name is given.

    `lm` is a base that is already loaded. Rows are never cut: one that does not fit raises DataError.
    """

    def __init__(
        self,
        prompt: str | Prompt | None = None,
        base: str | None = None,
        lm: FrozenLM | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 16,
        **unused: Any,
    ) -> None:
        super().__init__()
        learned = load_prompt(prompt) if isinstance(prompt, str) else prompt
        name = base or (learned.base.name if learned is not None else "") or "builtin"
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "auto"  # the harness's command line names a GPU on every machine
        self.lm = lm or FrozenLM.load(name, dtype=dtype, device=device)
        self._device = self.lm.device
        self.batch_rows = int(batch_size) if str(batch_size).isdigit() else 16
        front: tuple[Piece, ...] = (Soft(learned.length),) if learned is not None else ()
        self.continuing = self._compiled(
            learned, Template((*front, Field("context"), Field("wanted")), "wanted")
        )
        self.rolling = self._compiled(learned, Template((*front, Field("text"))))

    def _compiled(self, learned: Prompt | None, layout: Template) -> CompiledPrompt:
        return compile_prompt(self.lm, learned, template=layout)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name in the harness's cache of requests."""
        return self.lm.name

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The base's own chat template."""
        return str(
            self.lm.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would have generated it."""
        examples = [Example({"context": request.args[0], "wanted": request.args[1]}) for request in requests]
        self._need_room([request.args[0] + request.args[1] for request in requests])
        scored = score(self.lm, examples, None, self.continuing, batch_rows=self.batch_rows, progress=False)
        return [(scores.log_probability, scores.greedy) for scores in scored]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts. The first token is left out: the base alone has nothing to predict it from."""
        texts = [request.args[0] for request in requests]
        self._need_room(texts)
        scored = score(
            self.lm,
            [Example({"text": text}) for text in texts],
            None,
            self.rolling,
            batch_rows=self.batch_rows,
            progress=False,
        )
        return [scores.log_probability for scores in scored]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each up to the first of its stop texts."""
        settings = [_settings(dict(request.args[1])) for request in requests]
        self._need_room([request.args[0] for request in requests])
        examples = [Example({"context": request.args[0], "wanted": ""}) for request in requests]
        generations = generate(
            self.lm, examples, self.continuing, settings, batch_rows=self.batch_rows, progress=False
        )
        return [generation.text for generation in generations]

    def _need_room(self, texts: Sequence[str]) -> None:
        most = longest_text(self.lm)
        if most is None:
            return
        for text in set(texts):
            need = self.rolling.length + len(self.lm.tokenizer(text, verbose=False)["input_ids"])
            if need > most:
                raise DataError(
                    f"A text of the task needs {need} positions with the prompt, but {self.lm.name} has {most}. "
                    "Use fewer few-shot examples or a base with a longer context."
                )


def _settings(arguments: dict[str, Any]) -> DecodeSettings:
    stop = arguments.get("until") or ()
    temperature = float(arguments.get("temperature") or 0.0)
    return DecodeSettings(
        max_new_tokens=int(arguments.get("max_gen_toks") or arguments.get("max_new_tokens") or NEW_TOKENS),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        temperature=temperature if arguments.get("do_sample", temperature > 0) else 0.0,
        top_p=float(arguments.get("top_p") or 1.0),
        top_k=int(arguments.get("top_k") or 0),
    )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
