"""The base and how it is loaded: the settings that all verbs share. No torch here."""

from __future__ import annotations

from typing import Literal

from softprompt.settings.section import setting
from softprompt.settings.table import Table

Spread = Literal["none", "devices", "tensor", "layers"]


class BaseSettings(Table):
    """The frozen model that a verb works with."""

    base: str | None = setting(
        None,
        "The frozen model: `builtin`, a local folder, or a model's id on the hub; without it the one that the prompt "
        "was learned on, or the bundled one.",
        flag="--base",
        elsewhere="model",
    )
    base_revision: str | None = setting(
        None, "The hub model's commit, branch or tag.", flag="--base-revision"
    )
    dtype: Literal[
        "auto", "float32", "bfloat16", "float16", "int8", "int4", "int8-torchao", "int4-torchao"
    ] = setting(
        "auto",
        "The base's dtype; auto takes what the machine is fastest at; int8 and int4 quantise its weights, by bitsandbytes "
        "or by torchao.",
        flag="--dtype",
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps.", flag="--device")
    spread: Spread = setting(
        "none",
        "How a base that is larger than a device is spread: over the devices of this process (devices), or over the "
        "processes that torchrun started, each with a part of every matrix (tensor) or of every layer (layers).",
        flag="--spread",
    )
    trust_remote_code: bool = setting(
        False,
        "Run code that comes with the base. No base named here needs it.",
        flag="--trust-remote-code",
        by_hand=True,
    )
