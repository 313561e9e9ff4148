"""A base without its weights: tokenizer and config, enough to encode rows as a run would."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import transformers

from softprompt.base.context_length import demand_one_vector
from softprompt.base.identity import config_identity, tokenizer_sha256
from softprompt.base.locate import load_local_first, locate
from softprompt.base.whole import demand_ids_in_table
from softprompt.errors import BaseError
from softprompt.prompt.soft_prompt import Fingerprint


@dataclass(frozen=True)
class Outline:
    """A base without its weights. Make one with `load`; `config` is the language model's, as a FrozenLM has it.

    `generation_config` is that of the base's files; None where they have none."""

    name: str
    revision: str | None
    tokenizer: Any
    config: Any
    generation_config: Any = None

    @classmethod
    def load(
        cls, name_or_path: str = "builtin", *, revision: str | None = None, trust_remote_code: bool = False
    ) -> Outline:
        """Loads what FrozenLM.load would load, but no weights. Raises BaseError for what can be refused without them."""
        where, name = locate(name_or_path)
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}

        def read_configs(local: bool) -> tuple[Any, Any]:
            config = transformers.AutoConfig.from_pretrained(where, local_files_only=local, **options)
            generation = None
            with contextlib.suppress(OSError):  # not every base has one
                generation = transformers.GenerationConfig.from_pretrained(
                    where, local_files_only=local, revision=revision or "main"
                )
            return config, generation

        tokenizer, (config, generation) = load_local_first(where, name, options, read_configs)
        kind = type(config)
        own_code = getattr(config, "auto_map", None) or {}
        if kind not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in own_code:
            raise BaseError(
                f"{name}: not a causal language model, which is what a prompt is learned on: its config is a "
                f"{kind.__name__}. Choose another base."
            )
        text_config = config.get_text_config()
        demand_one_vector(text_config, type(text_config).__name__, name)
        if rows := getattr(text_config, "vocab_size", None):
            demand_ids_in_table(tokenizer, rows, name)
        return cls(
            name, revision or getattr(config, "_commit_hash", None), tokenizer, text_config, generation
        )

    @property
    def fingerprint(self) -> Fingerprint:
        """A fingerprint from config and tokenizer alone; weights are unknown, so a prompt of another base may match."""
        return Fingerprint(
            self.name,
            self.revision,
            layers=int(self.config.num_hidden_layers),
            tokenizer_sha256=tokenizer_sha256(self.tokenizer),
            config=config_identity(self.config),
        )
