"""Frozen blocks that stay in the computer's memory and visit the GPU for their turn.

Why not diffusers' `apply_group_offloading`: it is made for inference. It takes a layer's parameters home when its
forward pass is done, and autograd, which remembers a frozen weight as the parameter itself, finds the one at home in
the backward pass: another device, an error (with gradient checkpointing too, since the block is computed again under
the same hooks). A test holds diffusers to this: when it fails, this file may go.

Here a block's weights are parameters of their own while they visit: what autograd keeps stays where it was, and goes
when the backward pass lets go of it. Use it with gradient checkpointing: without, all blocks stay until then. All
weights lie in one page-locked arena, a block's in one piece, so that a visit is one copy. A second stream copies the
next block while one computes; which one that is, is known from the order of the first pass, which the backward pass
takes the other way. Not timed on a GPU.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emotrain.batch import Unpack, fill, layout
from emotrain.families.quantize import LORA_HOLDERS

AHEAD = 2  # blocks whose kernels may be waiting on the GPU before the host waits: more would hold more copies


@dataclass
class _Home:
    """A block's weights in the computer's memory; `places` are the modules and names of its parameters."""

    packed: Tensor
    unpack: Unpack
    places: list[tuple[nn.Module, str]]
    parameters: list[nn.Parameter]


@dataclass
class _Visit:
    """A copy on the device; `arrived` is the event after which it may be read, None where there are no streams."""

    packed: Tensor
    arrived: Any


class Offload:
    """The blocks of one model that are away, and the copies of those whose turn it is or is next."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.device = device
        self.stream: Any = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.homes = _go_home(blocks, device)
        self.order: list[int] = []  # blocks as the first pass visits them
        self.last: int | None = None  # place in that order
        self.there: dict[int, _Visit] = {}
        self.computed: deque[Any] = deque()
        self.copies = 0
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda module, args, index=index: self._come(index))
            block.register_forward_hook(lambda *args, index=index: self._go(index), always_call=True)

    def _come(self, index: int) -> None:
        """Give a block its weights, and send for those of the next."""
        if index not in self.order:
            self.order.append(index)
        visit = self.there.get(index) or self._send(index)
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(visit.arrived)
            visit.packed.record_stream(current)
        home = self.homes[index]
        for (module, name), tensor in zip(home.places, home.unpack(visit.packed), strict=True):
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        following = self._following(index)
        self.there = {one: kept for one, kept in self.there.items() if one == following} | {index: visit}
        if following is not None and following not in self.there:
            self.there[following] = self._send(following)

    def _following(self, index: int) -> int | None:
        """The block after this one: forwards, or backwards where the last one was this one or came after it."""
        place, last = self.order.index(index), self.last
        self.last = place
        after = place - 1 if place and last in (place, place + 1) else place + 1
        return self.order[after] if 0 <= after < len(self.order) else None

    def _send(self, index: int) -> _Visit:
        self.copies += 1
        packed = self.homes[index].packed
        if self.stream is None:
            return _Visit(packed.clone() if self.device.type == "cpu" else packed.to(self.device), None)
        while len(self.computed) >= AHEAD:
            self.computed.popleft().synchronize()
        with torch.cuda.stream(self.stream):
            moved = packed.to(self.device, non_blocking=True)
            return _Visit(moved, self.stream.record_event())

    def _go(self, index: int) -> None:
        """Put the parameters of home back; the copy stays for as long as autograd or `there` holds it."""
        home = self.homes[index]
        for (module, name), parameter in zip(home.places, home.parameters, strict=True):
            module._parameters[name] = parameter
        if self.stream is not None:
            self.computed.append(torch.cuda.current_stream(self.device).record_event())


def offload_blocks(
    model: nn.Module, device: torch.device, kinds: Sequence[str], room_gib: float = 0.0
) -> Offload | None:
    """Keep the blocks of a frozen model at home and move everything else to the device, a LoRA on it too.

    Args:
        model: on the CPU, with or without a LoRA.
        device: where its arithmetic is done.
        kinds: class names of its repeated blocks.
        room_gib: so much of the blocks may stay on the device.

    Returns:
        What moves them; None where all of them stay.
    """
    blocks, room = [], room_gib * 2**30
    for module in model.modules():
        if type(module).__name__ in kinds:
            size = sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad)
            if size <= room:
                room -= size
            else:
                blocks.append(module)
    moving = Offload(blocks, device) if blocks else None
    away = {place for home in moving.homes for place in home.places} if moving else set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if (module, name) not in away:
                parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set)
    return moving


def _go_home(blocks: Sequence[nn.Module], device: torch.device) -> list[_Home]:
    """The blocks' weights into one arena, block by block."""
    found = [_frozen(block) for block in blocks]
    layouts = [layout([module._parameters[name] for module, name in places]) for places in found]  # type: ignore[misc]
    arena = torch.empty(sum(size for size, _ in layouts), dtype=torch.uint8)
    homes = []
    pieces = torch.split(arena, [size for size, _ in layouts])
    for places, (_, unpack), packed in zip(found, layouts, pieces, strict=True):
        fill(packed, unpack, [module._parameters[name] for module, name in places])  # type: ignore[misc]
        parameters = [nn.Parameter(tensor, requires_grad=False) for tensor in unpack(packed)]
        for (module, name), parameter in zip(places, parameters, strict=True):
            module._parameters[name] = parameter
        homes.append(_Home(packed, unpack, places, parameters))
    if device.type == "cuda":  # now that it is full: what it was filled from has gone, block by block
        lock_pages(arena)
    return homes


def _frozen(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """Modules and names of a block's own parameters, without those of LoRAs on it."""
    inside = [module for path, module in block.named_modules() if LORA_HOLDERS.isdisjoint(path.split("."))]
    names = [(module, name) for module in inside for name, _ in module.named_parameters(recurse=False)]
    return [(module, name) for module, name in names if not getattr(module, name).requires_grad]


def lock_pages(arena: Tensor) -> None:
    """Lock a tensor's memory as it is: torch's own page-locked allocations are rounded up to powers of two.

    Where the system refuses, copies from it are slower.
    """
    cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = arena.data_ptr()
    if int(cuda.cudaHostRegister(address, arena.numel(), 0)) == 0:
        weakref.finalize(arena.untyped_storage(), cuda.cudaHostUnregister, address)
