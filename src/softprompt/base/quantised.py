"""Bases with weights in 8 or 4 bits, by bitsandbytes or torchao: a large model in little memory, at some cost in quality.

Only layers inside the body are quantised; embeddings and head stay as they are. A prompt learned so belongs to the
quantised weights: its fingerprint is theirs, and the same model in full is another base.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from softprompt.errors import BaseError, MissingExtra

TORCHAO_GROUP = 32  # weights that share a scale in 4 bits on a CPU
TORCHAO_GROUP_CUDA = 128
# A gradient that does not pass through a layer at all is off by 1; int8 activations round by about 1 %.
GRADIENT_TOLERANCE = 0.1


@dataclass(frozen=True)
class Quantisation:
    """A number of bits, and the library that keeps weights in them."""

    bits: int
    library: str


QUANTISATIONS: Mapping[str, Quantisation] = {
    "int8": Quantisation(8, "bitsandbytes"),
    "int4": Quantisation(4, "bitsandbytes"),
    "int8-torchao": Quantisation(8, "torchao"),
    "int4-torchao": Quantisation(4, "torchao"),
}
"""The dtypes that quantise a base while it is loaded."""


def quantised_options(dtype: str, compute: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Options for transformers' from_pretrained. Raises MissingExtra without the library."""
    wanted = QUANTISATIONS[dtype]
    for library in (wanted.library, "accelerate"):
        if find_spec(library) is None:
            raise MissingExtra(
                f"dtype: {dtype} needs {library}, which is not installed: pip install 'softprompt[quantised]'."
            )
    make = _bitsandbytes if wanted.library == "bitsandbytes" else _torchao
    return {"quantization_config": make(wanted.bits, compute, device), "device_map": {"": device}}


def _bitsandbytes(bits: int, compute: torch.dtype, device: torch.device) -> Any:
    settings: dict[str, Any] = {"load_in_8bit": True}  # Dettmers et al. 2022
    if bits == 4:  # Dettmers et al. 2023
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
    return transformers.BitsAndBytesConfig(**settings)  # type: ignore[no-untyped-call]


def _torchao(bits: int, compute: torch.dtype, device: torch.device) -> Any:
    from torchao import quantization
    from torchao.quantization.granularity import PerGroup

    dtypes: Any = torch  # whose stubs leave int4 out
    if bits == 8:
        how = quantization.Int8WeightOnlyConfig()
    elif device.type == "cuda":
        how = quantization.Int4WeightOnlyConfig(
            group_size=TORCHAO_GROUP_CUDA, int4_packing_format="tile_packed_to_4d"
        )
    else:  # torchao has no packed 4-bit kernel for CPUs: each number takes a byte
        how = quantization.IntxWeightOnlyConfig(weight_dtype=dtypes.int4, granularity=PerGroup(TORCHAO_GROUP))
    return transformers.TorchAoConfig(how)


def is_quantised(model: nn.Module) -> bool:
    """Whether layers hold weights in fewer bits than they compute with."""
    return next(_quantised_layers(model), None) is not None


def quantisers(model: nn.Module) -> str:
    """The libraries that quantised layers of `model` come from, with their versions; empty where none is."""
    names = {_library(layer) for layer in _quantised_layers(model)}
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(names))


def _quantised_layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if _library(module))


def _library(module: nn.Module) -> str:
    """The library that a layer's weights are quantised by; empty for plain weights."""
    weight = module._parameters.get("weight")
    if weight is None:
        return ""
    if type(module).__module__.startswith("bitsandbytes."):
        return "bitsandbytes"
    return "torchao" if type(weight).__module__.startswith("torchao.") else ""


def stored(tensor: Tensor) -> tuple[Tensor, ...]:
    """The plain tensors that a weight consists of: numbers and scales of a quantised one, else the tensor itself."""
    wrapped: Any = tensor
    if not is_traceable_wrapper_subclass(wrapped):
        return (tensor,)
    names, _ = wrapped.__tensor_flatten__()
    return tuple(part for name in names for part in stored(getattr(wrapped, name)))


def weight_count(weight: Tensor) -> int:
    """The number of weights in a tensor, which may hold several in one byte."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else int(state.shape.numel())


def shared_tensors(module: nn.Module) -> dict[int, Tensor]:
    """All that copies of `module` share with it, by id: for copy.deepcopy."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    for layer in _quantised_layers(
        module
    ):  # bitsandbytes keeps its 8-bit weights twice by name, once in memory
        state = vars(layer.state) if hasattr(layer, "state") else {}
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return {id(tensor): tensor for tensor in tensors}


def keep_weights(model: nn.Module, name: str) -> None:
    """Lets bitsandbytes' layers on a CPU compute with their weights as they are, in place.

    By itself bitsandbytes repacks 4-bit weights in the first pass without a gradient, where the CPU has bfloat16
    instructions; from then on no gradient passes through them, and their digest is another. And it rounds the inputs
    of 8-bit layers to 8 bits together with those of other rows, so that a row's result would depend on its neighbours.
    Raises BaseError where weights were repacked before."""
    for layer in _quantised_layers(model):
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            state = getattr(layer.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise BaseError(
                    f"{name}: bitsandbytes has repacked its 4-bit weights for this CPU in an earlier pass, and no "
                    "gradient passes through them now. Load the model again and give it here before it is used."
                )
            layer.support_avx512bf16_for_cpu = False
        elif hasattr(layer, "init_8bit_state") and layer.weight.device.type == "cpu":
            layer.forward = MethodType(_by_weights_alone, layer)


def _by_weights_alone(self: Any, x: Tensor) -> Tensor:
    """Replaces Linear8bitLt.forward on a CPU: weights in 8 bits, inputs as they are."""
    import bitsandbytes

    if self.weight.CB is not None:
        self.init_8bit_state()
    self.state.is_training = True  # the road of bitsandbytes.matmul that multiplies with the weights in full
    bias = None if self.bias is None else self.bias.to(x.dtype)
    result: Tensor = bitsandbytes.matmul(x, self.weight, bias=bias, state=self.state)
    return result


def demand_plain_ends(embedding_VD: Any, head_VD: Any, name: str) -> None:
    """Raises BaseError where embeddings or head are quantised, which prompts are joined to and losses are taken from."""
    for tensor, what in ((embedding_VD, "embedding table"), (head_VD, "output layer")):
        if not tensor.is_floating_point() or type(tensor).__module__.startswith("torchao."):
            raise BaseError(
                f"{name}: its {what} is quantised. Quantise the layers inside its body alone, as --dtype int8 does."
            )


def demand_whole_layers(spread: str, name: str) -> None:
    """Raises BaseError for a way to spread a base that cuts quantised weights."""
    if spread in ("tensor", "layers"):
        raise BaseError(
            f"{name}: spread is {spread}, which cuts matrices, and its weights are quantised, which cannot be cut. Set spread "
            "to devices or none."
        )


def demand_gradients(model: nn.Module, dtype: torch.dtype, name: str) -> None:
    """Raises BaseError where the gradient of a quantised layer is not that of what it computes.

    A layer is linear in its input, f(x) = A x + b. So for y = A x, the gradient A' y of y at x must give x . A' y = y . y. One
    layer of each kind is asked."""
    asked = set()
    for layer in _quantised_layers(model):
        kind = (type(layer), type(layer.weight))
        width = getattr(layer, "in_features", None)
        if kind in asked or width is None:
            continue
        asked.add(kind)
        fault = ""
        try:
            with torch.inference_mode(False), torch.enable_grad():
                drawn = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
                given = drawn.to(layer.weight.device, dtype)
                leaf = given.clone().requires_grad_()
                result = layer(leaf)
                own = (result - layer(torch.zeros_like(given))).detach()
                (slope,) = torch.autograd.grad(result, leaf, own)
            wanted = float((own.double() ** 2).sum())
            off = abs(float((slope.double() * given.double()).sum()) / wanted - 1) if wanted else 0.0
            if not off <= GRADIENT_TOLERANCE:
                fault = f"it is off by {off:.0%}"
        except (RuntimeError, NotImplementedError) as error:
            fault = " ".join(str(error).split())[:200]
        if fault:
            raise BaseError(
                f"{name}: no gradient passes rightly through its layers of {_library(layer)} ({type(layer).__name__} with "
                f"{type(layer.weight).__name__}: {fault}). Such a base can be used, but no prompt can be learned on it. "
                f"Take another of --dtype {', '.join(QUANTISATIONS)}, or the base in full."
            )
