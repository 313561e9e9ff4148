"""The prompts that an engine holds, by the digest of their content, compiled when they are first asked for."""

from __future__ import annotations

from collections import OrderedDict

from softprompt.base.frozen_lm import FrozenLM
from softprompt.inference.compiled import CompiledPrompt, compile_prompt
from softprompt.prompt.soft_prompt import Prompt
from softprompt.serving.engine import PromptGone

COMPILED_BYTES = 2 * 10**9  # of compiled prompts that are kept


class HeldPrompts:
    """Prompts by digest. Any thread may load and unload; only the engine's thread compiles."""

    def __init__(self, lm: FrozenLM) -> None:
        self.lm = lm
        self._prompts: dict[str, Prompt] = {}
        self._compiled: OrderedDict[str | None, CompiledPrompt] = OrderedDict()

    @property
    def digests(self) -> frozenset[str]:
        """Those that requests may name."""
        return frozenset(self._prompts)

    def load(self, prompt: Prompt, digest: str) -> None:
        """Holds a prompt. Raises WrongBase where it belongs to another base."""
        prompt.base.demand(self.lm.fingerprint, prompt.name)
        self._prompts[digest] = prompt

    def unload(self, digest: str) -> None:
        """Holds a prompt no longer."""
        self._prompts.pop(digest, None)

    def find(self, digest: str | None) -> Prompt | None:
        """The prompt of a digest, None for the base alone. Raises PromptGone."""
        if digest is None:
            return None
        prompt = self._prompts.get(digest)
        if prompt is None:
            raise PromptGone("The model was removed a moment ago.")
        return prompt

    def discard(self, digest: str) -> None:
        """Forgets the compiled prompt, unless the prompt was loaded again."""
        if digest not in self._prompts:
            self.forget(digest)

    def forget(self, digest: str) -> None:
        """Forgets the compiled prompt; it is compiled again where it is asked for."""
        self._compiled.pop(digest, None)

    def compiled(self, digest: str | None, prompt: Prompt | None) -> CompiledPrompt:
        """The prompt's keys and values; the most recently used ones are kept within a budget of bytes."""
        if digest not in self._compiled:
            self._compiled[digest] = compile_prompt(self.lm, prompt)
        self._compiled.move_to_end(digest)
        while len(self._compiled) > 1 and self._bytes > COMPILED_BYTES:
            self._compiled.popitem(last=False)
        return self._compiled[digest]

    @property
    def _bytes(self) -> int:
        return sum(compiled.bytes for compiled in self._compiled.values())
