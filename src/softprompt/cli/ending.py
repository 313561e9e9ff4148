"""The end of a command: the one owner of turning an exception into a message on stderr and an exit code.

0    done
1    any other failure
2    usage, or a recipe that is refused
3    data refused
4    out of memory
5    base or prompt refused
100  a measured figure is under the demanded one
130  interrupted: Ctrl-C, SIGTERM or SIGHUP
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from typer.exceptions import Abort, TyperException

from softprompt.errors import SoftPromptError, first_line

INTERRUPTED = 130
NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
"""How torch and its allocators say it."""


def exit_code(call: Callable[[], Any], *, traceback: Callable[[], bool] = lambda: False) -> int:
    """Calls, and says in one message what went wrong; where `traceback()` is true, also where.

    SIGTERM and SIGHUP end the call as Ctrl-C does, so that what was learned is kept."""
    try:
        with _signals_interrupt():
            result = call()
        if result == INTERRUPTED:  # typer turns Ctrl-C into this code
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except TyperException as error:
        return _say(_usage(error), 2)
    except (KeyboardInterrupt, Abort):
        return _say("interrupted.", INTERRUPTED)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BrokenPipeError:
        # The reader has gone (`softprompt ... | head`); a second flush at exit would only complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if traceback():
            import traceback as printer

            printer.print_exception(error)
        message, code = describe(error)
        return _say(message, code)


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Raises KeyboardInterrupt on SIGTERM (a scheduler stops the job) and SIGHUP (the terminal has gone)."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # A signal that is ignored (nohup) stays ignored; only the main thread may set handlers.
    former = {
        number: signal.getsignal(number)
        for number in numbers
        if threading.current_thread() is threading.main_thread()
        and signal.getsignal(number) is signal.SIG_DFL
    }
    for number in former:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in former.items():
            # A command that ignores it (a follower of `serve`, whose first process ends it) ignores one that comes late too.
            if signal.getsignal(number) is interrupt:
                signal.signal(number, handler)


def describe(error: Exception) -> tuple[str, int]:
    """An exception in a person's words, and its exit code."""
    if isinstance(error, SoftPromptError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in NO_MEMORY):
        return (
            "out of memory. Choose a smaller base or tune.batch_size=1, shorten the texts with data.max_length, "
            f"or close other programs. ({first_line(error)})",
            4,
        )
    if isinstance(error, OSError) and error.errno is not None:
        file = f" {error.filename}:" if error.filename else ""
        advice = "Free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "Check it"
        return f"the system refused:{file} {error.strerror}. {advice}, and run again.", 1
    return (
        f"{type(error).__name__}: {first_line(error)}\nThis should not happen. Run again with --traceback to see "
        "where, and report it.",
        1,
    )


def _usage(error: TyperException) -> str:
    context = getattr(error, "ctx", None)
    if context is None:
        return error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":  # `softprompt` alone: its help has been shown
        return "no verb was given."
    message = error.format_message().rstrip()
    message += "" if message.endswith((".", "?")) else "."
    return f"{message} `{context.command_path} --help` shows what there is."


def _say(message: str, code: int) -> int:
    from rich.text import Text

    from softprompt.progress.console import Screen, visible

    Screen(stderr=True, soft_wrap=True).print(Text.assemble(("softprompt: ", "bold red"), visible(message)))
    return code
