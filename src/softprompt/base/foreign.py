"""Messages of other libraries: errors passed on in one line, progress bars and advice kept from the terminal."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any

import transformers
from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

MAX_GIST = 300  # characters


def gist(error: BaseException) -> str:
    """The whole of what an error says, on one line of bounded length; with its class where that says more."""
    text = " ".join(str(error).split())
    if len(text) > MAX_GIST:
        text = text[:MAX_GIST].rpartition(" ")[0] + " …"
    if not text or isinstance(error, KeyError):
        text = f"{type(error).__name__} {text}".strip()
    return text


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' bars and advice from the terminal; errors still come as exceptions."""
    log: Any = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


@contextlib.contextmanager
def shown_on_terminals(download: str) -> Iterator[None]:
    """Says on terminals that the hub is asked for `download`, and shows the hub's own bars there, which `quiet` keeps away."""
    if not sys.stderr.isatty() or HF_HUB_DISABLE_PROGRESS_BARS:
        yield
        return
    from softprompt.progress.console import set_aside  # rich

    with set_aside():
        print(f"{download}: not in the local hub cache, so the hub is asked", file=sys.stderr)
        enable_progress_bars()
        try:
            yield
        finally:
            disable_progress_bars()


@contextlib.contextmanager
def bars_on_terminals_alone() -> Iterator[None]:
    """Keeps what a library writes to stderr (a bar that it has no switch for) on terminals, out of files and pipes."""
    if sys.stderr.isatty():
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()):
        yield
