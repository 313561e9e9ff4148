"""The base as settings name it, and settings that name a base: how the processes of one work come to the same one."""

from __future__ import annotations

import json
import socket
from functools import lru_cache
from pathlib import Path
from typing import Any

from softprompt.base.disk_cache import Stamp
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.quantised import is_quantised
from softprompt.errors import BaseError
from softprompt.prompt.soft_prompt import Fingerprint
from softprompt.settings.base_settings import BaseSettings


def base_of(settings: BaseSettings) -> FrozenLM:
    """Loads the base; the bundled one where none is named."""
    return FrozenLM.load(
        settings.base or "builtin",
        revision=settings.base_revision,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        spread=settings.spread,
    )


def kept_base(settings: BaseSettings, wanted: Fingerprint | None = None) -> FrozenLM:
    """The same, kept in this process for the next part of a work that is spread over workers, while its files are unchanged.

    Raises BaseError unless it is the base `wanted`, where that is given."""
    own = BaseSettings(**{name: getattr(settings, name) for name in BaseSettings.model_fields})
    lm = _loaded(own.model_dump_json(), _files(own.base or ""))
    if wanted is not None and lm.fingerprint.digest != wanted.digest:
        raise BaseError(
            f"{lm.name}: is another base on {socket.gethostname()} (found {lm.fingerprint.digest[:12]}, wanted {wanted.digest[:12]}). "
            "Give all machines of the cluster the same files."
        )
    return lm


def _files(base: str) -> str:
    """The state of a local base's files: a process that works for long must not go on with what they held before."""
    path = Path(base).expanduser()
    if not base or not path.exists():
        return ""  # the bundled one, or one of the hub
    return Stamp.of([path] if path.is_file() else [each for each in path.iterdir() if each.is_file()]).key


@lru_cache(maxsize=1)
def _loaded(settings_json: str, files: str) -> FrozenLM:
    return base_of(BaseSettings(**json.loads(settings_json)))


def settings_of(lm: FrozenLM) -> BaseSettings:
    """Settings that load the same base, in the same dtype, in another process. Raises BaseError for a quantised one."""
    if is_quantised(lm.model):
        raise BaseError(
            f"{lm.name}: is quantised, which other machines cannot do alike. Load it in float32 or bfloat16 (--dtype) to "
            "spread work over a cluster."
        )
    dtype: Any = str(lm.dtype).removeprefix("torch.")
    return BaseSettings(base=lm.name, base_revision=lm.revision, dtype=dtype)
