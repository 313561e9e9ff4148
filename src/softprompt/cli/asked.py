"""Options that several verbs share: which base, loaded how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

if TYPE_CHECKING:
    from softprompt.base.frozen_lm import FrozenLM

Base: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--base", help="The frozen model: `builtin`, a folder or a hub id.", show_default="the prompt's own"
    ),
]
Revision: TypeAlias = Annotated[
    str | None, typer.Option("--base-revision", help="The hub model's commit or tag.")
]
Dtype: TypeAlias = Annotated[
    str, typer.Option("--dtype", help="auto, float32, bfloat16, float16, int8, int4.")
]
Device: TypeAlias = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, mps.")]
TrustRemoteCode: TypeAlias = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the base.")
]
Overrides: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Any setting of the recipe; `softprompt recipe` lists them."
    ),
]
AsJson: TypeAlias = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout, all else on stderr.")
]


def describe_base(lm: FrozenLM) -> dict[str, object]:
    """The base as facts for people and records for machines."""
    dtype = str(lm.dtype).removeprefix("torch.")
    return {
        "name": lm.name,
        "revision": lm.revision,
        "parameters": lm.num_parameters,
        "layers": lm.num_layers,
        "width": lm.width,
        "vocabulary": lm.vocab_size,
        "context": lm.max_positions,
        "dtype": dtype,
        "dtype_reason": lm.dtype_reason,
        "device": str(lm.device),
        "fingerprint": lm.fingerprint.sha256,
    }
