"""A conversation that keeps what the model holds: each turn computes only what is new."""

from __future__ import annotations

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import EMPTY, State
from softprompt.data.example import Example, Message
from softprompt.data.tokenizer import tokens
from softprompt.inference.compiled import Promptable, compile_prompt
from softprompt.inference.generate import Generation, generation, run
from softprompt.inference.prefill import PrefillRow
from softprompt.inference.request import GREEDY, request
from softprompt.inference.running_batch import Running
from softprompt.inference.settings import DecodeSettings


class Conversation:
    """Turns under one prompt. `say` something, get the answer, continue.

    Under a chat template a turn is a message of the user, and the whole chat is laid out again for each answer; else a
    turn is text that continues where the last answer ended. Either way the key/value state is kept as far as the
    sequence is the same, so the answers are those of recomputing everything.
    """

    def __init__(self, lm: FrozenLM, prompt: Promptable = None) -> None:
        self.lm = lm
        self.prompt = compile_prompt(lm, prompt)
        self.messages: list[Message] = []
        self.marks: tuple[int, ...] = ()
        self.state: State = EMPTY

    def __repr__(self) -> str:
        return f"Conversation({len(self.marks)} positions, {self.prompt!r})"

    @property
    def bytes(self) -> int:
        """Memory of the state that is kept."""
        return self.state.bytes

    def say(self, text: str, settings: DecodeSettings = GREEDY) -> Generation:
        """Adds a turn and generates the answer to it (the first of `settings.n`).

        Raises DataError where it does not fit the base's context; the conversation is then as it was."""
        messages = [*self.messages, Message("user", text)]
        turn = request(self.lm, self.prompt, "", settings, keep_state=True, row=self._row(text, messages))
        run(Running(self.lm, max_rows=1), [turn])
        assert turn.state is not None
        self.state, self.marks = turn.state, (*turn.row.marks, *turn.token_ids)
        if self.prompt.template.chat:
            self.messages = [*messages, Message("assistant", turn.text)]
        return generation(self.prompt.name, text, turn)

    def _row(self, text: str, messages: list[Message]) -> PrefillRow:
        if self.prompt.template.chat:
            marks = self.prompt.marks(self.lm, Example({}, tuple(messages)))
        elif not self.marks:
            marks = self.prompt.marks(self.lm, text)
        else:
            data = () if self.prompt.special_tokens else [(0, len(text))]
            marks = [
                *self.marks,
                *tokens(self.lm.tokenizer, text, self.prompt.special, continues=True, data=data),
            ]
        known_state = (
            self.state if self.state.shared(marks) >= self.prompt.state.shared(marks) else self.prompt.state
        )
        return PrefillRow(
            known_state.first(min(known_state.shared(marks), len(marks) - 1)),
            tuple(marks),
            self.prompt.vectors_PD,
        )
