"""Where the tensors of an engine lie, and of which type they are.

On the CPU float32, as ever: nothing is moved or converted, so that no bit changes. On a GPU
bfloat16.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec
import torch
from torch import Tensor

from aivillage.models import gpu
from aivillage.models.inference.gguf_model import Layer, LlamaWeights, StageWeights
from aivillage.protocols.errors import ConfigError

_CAPABILITY_MIN: Final = (8, 0)
"""Ampere: earlier ones have no bfloat16 in their matrix units."""


class Placement(msgspec.Struct, frozen=True):
    device: torch.device
    dtype: torch.dtype

    @property
    def is_host(self) -> bool:
        return self.device.type == gpu.CPU

    def take(self, tensor: Tensor) -> Tensor:
        """`tensor` here and of this type: itself, where it is already."""
        return tensor.to(device=self.device, dtype=self.dtype)


HOST: Final = Placement(torch.device(gpu.CPU), torch.float32)


def prepare(wanted: gpu.Device) -> Placement:
    """Makes this process ready to compute on the device that is wanted.

    Raises:
        ConfigError: there is none such that torch can use, or it has no bfloat16.
    """
    if not wanted.is_gpu:
        return HOST
    index = _index(wanted.name)
    properties = torch.cuda.get_device_properties(index)
    if (properties.major, properties.minor) < _CAPABILITY_MIN:
        raise _unusable(f"{properties.name} has no bfloat16")
    share = memory_share(wanted.memory_bytes_max, properties.total_memory)
    torch.cuda.set_device(index)
    torch.cuda.set_per_process_memory_fraction(share, index)
    # Not a promise: it only takes away what is known to vary from run to run.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return Placement(torch.device(gpu.CUDA, index), torch.bfloat16)


def memory_share(bytes_max: int, total_bytes: int) -> float:
    """What `torch.cuda.set_per_process_memory_fraction` takes for so many bytes; 0: the default."""
    return min(1.0, bytes_max / total_bytes) if bytes_max else gpu.MEMORY_SHARE


def no_memory(error: torch.OutOfMemoryError) -> str:
    """What a session is told whose step did not fit on the GPU; what it held is given back."""
    torch.cuda.empty_cache()
    return f"the GPU's memory is full: {str(error)[:200]}"


def on_host(tensor: Tensor) -> Tensor:
    """Float32 in the machine's memory, for draws and wires: itself, where it is that already."""
    return HOST.take(tensor)


def hardware(at: Placement) -> str:
    """Its part of a kernel class: what the bits of a product depend on, as far as it has a name."""
    if at.is_host:
        return f"{gpu.CPU}/{torch.backends.cpu.get_cpu_capability()}"
    found = torch.cuda.get_device_properties(at.device)
    name = re.sub(r"[^A-Za-z0-9.]+", "-", found.name)[:48]
    return f"{gpu.CUDA}/sm{found.major}{found.minor}-{name}"


def type_name(at: Placement) -> str:
    """`float32` or `bfloat16`."""
    return str(at.dtype).removeprefix("torch.")


def placed(weights: LlamaWeights, at: Placement) -> LlamaWeights:
    """The same weights there; a head that shares the table of words goes on sharing it."""
    embedding = at.take(weights.embedding)
    return msgspec.structs.replace(
        weights,
        embedding=embedding,
        head=embedding if weights.head is weights.embedding else at.take(weights.head),
        norm=at.take(weights.norm),
        layers=(_placed_layer(layer, at) for layer in weights.layers),
    )


def placed_stage(weights: StageWeights, at: Placement) -> StageWeights:
    """The same for some layers."""
    read_head = weights.head
    return msgspec.structs.replace(
        weights,
        embedding=None if weights.embedding is None else at.take(weights.embedding),
        head=None if read_head is None else lambda: at.take(read_head()),
        norm=None if weights.norm is None else at.take(weights.norm),
        layers=(_placed_layer(layer, at) for layer in weights.layers),
    )


def _placed_layer(layer: Layer, at: Placement) -> Layer:
    return Layer(**{name: at.take(part) for name, part in msgspec.structs.asdict(layer).items()})


def _index(name: str) -> int:
    """Raises: ConfigError: torch has no CUDA here, or no such device."""
    if not torch.cuda.is_available():
        raise _unusable(f"torch {torch.__version__} finds no CUDA device")
    index, count = int(name.partition(":")[2] or 0), torch.cuda.device_count()
    if index >= count:
        raise _unusable(f"there is no {name}: torch finds {count} devices, from cuda:0 on")
    return index


def _unusable(why: str) -> ConfigError:
    return ConfigError(
        f"no engine can compute on a GPU here: {why}",
        next_step="install NVIDIA's driver and a build of torch for CUDA, or set device = cpu; "
        "then restart the node",
    )
