"""`softprompt chat`: talk to the base under a prompt, word by word; switch prompts while talking."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from softprompt.cli import asked
from softprompt.cli.flags import takes
from softprompt.cli.screen import screen
from softprompt.errors import DataError, SoftPromptError
from softprompt.inference.settings import DecodeSettings
from softprompt.progress.console import visible
from softprompt.settings.base_settings import BaseSettings

if TYPE_CHECKING:
    from softprompt.base.frozen_lm import FrozenLM
    from softprompt.data.example import Example
    from softprompt.prompt.soft_prompt import Prompt

EXAMPLE = "softprompt chat --prompt runs/support"
HELP = """/prompt NAME    answer under this prompt      /base  answer without a prompt
/compare        show both answers from now on  /save FILE  write what was said
/reset          forget what was said           /quit  leave (also Ctrl-D)"""


@takes(BaseSettings, DecodeSettings)
def command(
    base: BaseSettings,
    decode: DecodeSettings,
    *,
    prompt: Annotated[Path | None, typer.Option("--prompt", help="The folder of a prompt.")] = None,
) -> None:
    """Talk to the base, under a prompt or without; /help shows what can be typed."""
    asked.demand_folders([prompt] if prompt is not None else [])
    from softprompt.store.artifact import load_prompt

    learned = None if prompt is None else load_prompt(prompt)
    lm = asked.load_base(base, *([learned] if learned is not None else []))
    Chat(lm, learned, decode, "base" if prompt is None else _name_of(str(prompt))).run()


@dataclass(frozen=True)
class Exchange:
    """A text and the answer to it: under which prompt, and what that was called."""

    text: str
    answer: str
    prompt: Prompt | None
    name: str


class Chat:
    """One talk: who answers, and what was said. `name` is what the prompt is called, versions of one name apart."""

    def __init__(
        self, lm: FrozenLM, prompt: Prompt | None, decode: DecodeSettings, name: str = "base"
    ) -> None:
        if prompt is not None:
            prompt.base.demand(lm.fingerprint, prompt.name)
        self.lm, self.prompt, self.decode, self.name = lm, prompt, decode, name
        self.compares = False
        self.exchanges: list[Exchange] = []
        self.console = screen()

    def run(self) -> None:
        """Reads lines until the end; every line is a command or something to answer."""
        if sys.stdin.isatty():
            self.console.print(HELP, markup=False)
        while True:
            if sys.stdin.isatty():
                sys.stdout.write(f"{self.name}> ")
                sys.stdout.flush()
            line = sys.stdin.readline()
            if not line or line.strip() == "/quit":
                return
            try:
                self.take(line.rstrip("\n"))
            except SoftPromptError as error:  # the conversation continues
                self.console.print(str(error), markup=False, soft_wrap=True)

    def take(self, line: str) -> None:
        """Does what a line asks for. Raises the errors of softprompt.errors."""
        verb, _, rest = line.strip().partition(" ")
        match verb:
            case "":
                return
            case "/help":
                self.console.print(HELP, markup=False)
            case "/base":
                self.prompt, self.name = None, "base"
            case "/prompt":
                self.use(rest.strip())
            case "/compare":
                self.compares = not self.compares
            case "/reset":
                self.exchanges.clear()
            case "/save":
                self.save(rest.strip())
            case _ if verb.startswith("/"):
                raise DataError(f"{verb}: there is no such command. /help shows them.")
            case _:
                self.answer(line)

    def use(self, folder: str) -> None:
        """Answers under another prompt."""
        from softprompt.store.artifact import load_prompt

        prompt = load_prompt(folder)
        prompt.base.demand(self.lm.fingerprint, folder)
        self.prompt, self.name = prompt, _name_of(folder)

    def save(self, path: str) -> None:
        """Writes what was said; an existing file is kept."""
        if not path:
            raise DataError("/save needs the name of a file.")
        try:
            with Path(path).open("x", encoding="utf-8") as file:
                file.writelines(
                    f"you: {each.text}\n{each.name}: {each.answer}\n\n" for each in self.exchanges
                )
        except FileExistsError:
            raise DataError(f"{path}: exists already. Give another name.") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}).") from error

    def answer(self, text: str) -> None:
        """Answers a text, under the prompt and, where they are compared, without it."""
        from softprompt.inference.generate import generate

        prompts = [self.prompt, None] if self.compares and self.prompt is not None else [self.prompt]
        for prompt in prompts:
            name = self.name if prompt is not None else "base"
            if len(prompts) > 1:
                sys.stdout.write(f"[{visible(name)}] ")
            given = self._with_former_turns(text, prompt)

            def show(index: int, piece: str) -> None:
                sys.stdout.write(visible(piece))
                sys.stdout.flush()

            (generation,) = generate(self.lm, [given], prompt, self.decode, on_text=show)
            sys.stdout.write("\n")
            self.exchanges.append(Exchange(text, generation.text.strip(), prompt, name))

    def _with_former_turns(self, text: str, prompt: Prompt | None) -> str | Example:
        """The whole talk where the prompt is laid out as a chat; the text alone elsewhere."""
        from softprompt.data.example import Example, Message
        from softprompt.data.template import Template

        layout = (
            Template.parse(prompt.template or "{text}", target=prompt.target) if prompt is not None else None
        )
        if layout is None or not layout.chat:
            return text
        turns = []
        for each in self.exchanges:
            if each.prompt == prompt:
                turns += [Message("user", each.text), Message("assistant", each.answer)]
        return Example({}, (*turns, Message("user", text)))


def _name_of(place: str) -> str:
    """The last part of a prompt's place: `support@2` of library/support@2."""
    return Path(place).resolve().name
