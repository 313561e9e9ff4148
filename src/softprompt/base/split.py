"""Weights of a base in parts: over the devices of one process, or over processes, each with a part of every matrix or layer.

With `devices`, one process holds the base over all devices that it sees, and what does not fit there in the CPU's memory or
on disk (accelerate). With `tensor`, each process computes with its part of every matrix, the head over the vocabulary included. With `layers`,
each process keeps a part of every layer and gathers the layer when it computes; embedding and head are whole. Either
way all processes read the same rows in step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from softprompt.base.processes import joined
from softprompt.errors import BaseError


def split_options(spread: str, name: str) -> dict[str, Any]:
    """What `from_pretrained` is given to load a base in parts. Raises BaseError where there is one process alone."""
    if spread == "none":
        return {}
    if spread == "devices":
        return {"device_map": "auto"}
    processes = joined()
    if processes.count == 1:
        raise BaseError(
            f"{name}: spread is {spread}, which wants several processes, found one. Start them with "
            "`torchrun --nproc-per-node N -m softprompt ...`, or set spread to none."
        )
    if spread == "layers":
        return {}  # split after loading
    from transformers.distributed.configuration_utils import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_plan="auto")}


def split_layers(model: nn.Module, num_layers: int, device: torch.device, name: str) -> None:
    """Leaves this process a part of every layer, in place."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            for layer in module:
                # Each layer is a root of its own, which would keep the gathered weights after its forward pass.
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
            return
    raise BaseError(f"{name}: its layers are not in one list, so they cannot be split. Set spread to none.")


def is_split(model: nn.Module) -> bool:
    """Whether this process holds parts of weights, the rest of which other processes hold."""
    return any(hasattr(weight, "full_tensor") for weight in model.parameters()) or any(
        hasattr(module, "set_reshard_after_forward") for module in model.modules()
    )


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate's hooks bring inputs, or weights from the CPU's memory or from disk, to where a module computes."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def fetched(model: nn.Module, *, by_name: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every parameter with its name, in the model's order or by name; those that lie on disk or in the CPU's memory are
    fetched for as long as each is asked for."""
    parameters = model.named_parameters()
    for name, parameter in sorted(parameters, key=_name) if by_name else parameters:
        if not parameter.is_meta:
            yield name, parameter.detach()
            continue
        path, _, own = name.rpartition(".")
        with fetched_module(model.get_submodule(path)) as module:
            yield name, getattr(module, own).detach()


def _name(named: tuple[str, Tensor]) -> str:
    return named[0]


@contextlib.contextmanager
def fetched_module(module: nn.Module) -> Iterator[nn.Module]:
    """The module with its own weights fetched to where it computes."""
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield module


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that processes hold in parts; all of them must ask. The tensor itself where it is whole."""
    gather = getattr(tensor, "full_tensor", None)
    gathered: Tensor = tensor if gather is None else gather()
    return gathered


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; the tensor itself where it is whole."""
    local = getattr(tensor, "to_local", None)
    part: Tensor = tensor if local is None else local()
    return part


@dataclass(frozen=True)
class Shard:
    """A process' part of a vocabulary of `size`: the entries from `first` on."""

    first: int
    size: int

    @classmethod
    def of(cls, weight_VD: Tensor) -> Shard | None:
        """Where the rows of a weight that processes hold in parts lie in the whole; None where it is whole."""
        mesh = getattr(weight_VD, "device_mesh", None)
        if mesh is None:
            return None
        # As DTensor cuts: equal parts, the last ones shorter.
        each = -(-weight_VD.shape[0] // mesh.size())
        return cls(min(mesh.get_local_rank() * each, weight_VD.shape[0]), int(weight_VD.shape[0]))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all parts, in place."""
        distributed.all_reduce(tensor)
        return tensor

    def highest(self, tensor: Tensor) -> Tensor:
        """The highest of all parts, in place."""
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return tensor

    def joined(self, part_NV: Tensor) -> Tensor:
        """All columns, from each process' own."""
        whole_NV = torch.zeros(*part_NV.shape[:-1], self.size, dtype=torch.float32, device=part_NV.device)
        whole_NV[..., self.first : self.first + part_NV.shape[-1]] = part_NV
        return self.sum(whole_NV).to(part_NV.dtype)
