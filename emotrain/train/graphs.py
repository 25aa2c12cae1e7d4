"""CUDA graphs of forward and backward passes: recorded once for each shape, then started by one launch.

A step of a LoRA is thousands of small kernels, and a host that starts them one by one is slower than a fast GPU. A
replayed graph does the same kernels in the same order on the same addresses: its numbers are those of passes without.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emotrain.batch import Unpack, layout, pack, send
from emotrain.errors import first_line

WARM_UP = 1  # passes of a shape before it is recorded: libraries choose and load their kernels in it
NEAR = 0.02  # relative difference of losses and gradients of one pass done twice: kernels add in no fixed order
MOST = 32  # graphs kept: each holds its launches, all share one pool for what they compute
Work = Callable[[Sequence[Tensor]], Tensor]


@dataclass
class _Recorded:
    """A pass: where its inputs lie on the device, what starts it, and where its result will be."""

    inputs: Tensor
    unpack: Unpack
    replay: Callable[[], None]
    result: Tensor


class Graphs:
    """The recorded passes of one run.

    Args:
        device: a CUDA device.
        gradients: the buffers that a pass adds to; they are zero before each.
        notify: gets one line where recording does not work; the run then goes on without.
    """

    def __init__(
        self, device: torch.device, gradients: Callable[[], Sequence[Tensor]], notify: Callable[[str], None]
    ) -> None:
        self.device, self.gradients, self.notify, self.works = device, gradients, notify, True
        self._checked: set[Hashable] = set()
        self._seen: dict[Hashable, int] = {}
        self._recorded: dict[Hashable, _Recorded] = {}
        self._pool: Any = None

    def run(self, key: Hashable, tensors: Sequence[Tensor], work: Work) -> Tensor:
        """What `work` gives for the CPU's `tensors`, sent to the device.

        Args:
            key: everything besides the values of `tensors` that `work` depends on.
            tensors: inputs, on the CPU.
            work: a pass without a wait for the device or a random draw; its result lives there.
        """
        key = (key, tuple((tensor.shape, tensor.dtype) for tensor in tensors))
        if key in self._recorded and key in self._checked:
            return self._play(self._recorded[key], tensors)
        known = self._seen.get(key, 0) >= WARM_UP
        self._seen[key] = self._seen.get(key, 0) + 1
        if not known or not self.works or len(self._recorded) >= MOST:
            return work(send(tensors, self.device))
        if key in self._checked:  # it was recorded before, and dropped
            recorded = self._record(key, tensors, work)
            return work(send(tensors, self.device)) if recorded is None else self._play(recorded, tensors)
        return self._record_beside(key, tensors, work)

    def _play(self, recorded: _Recorded, tensors: Sequence[Tensor]) -> Tensor:
        packed = pack(tensors, recorded.inputs.numel(), recorded.unpack, self.device)
        recorded.inputs.copy_(packed, non_blocking=True)
        recorded.replay()
        return recorded.result.clone()

    def _record_beside(self, key: Hashable, tensors: Sequence[Tensor], work: Work) -> Tensor:
        """The result of a pass as it is, whose numbers the recorded one must have too: else no more are recorded.

        The pass comes first: what it computed is given back before the recording takes memory, which it keeps.
        """
        result = work(send(tensors, self.device))
        made = [gradient.clone() for gradient in self.gradients()]
        torch._foreach_zero_(list(self.gradients()))
        try:
            recorded = self._record(key, tensors, work)
            if recorded is not None:
                self._compare(recorded, tensors, result, made)
                self._checked.add(key)
        except (RuntimeError, MemoryError) as error:  # the replay: an operation that was recorded, and may not be
            self._give_up(first_line(error))
        torch._foreach_copy_(list(self.gradients()), made)
        return result

    def _compare(self, recorded: _Recorded, tensors: Sequence[Tensor], result: Tensor, made: Sequence[Tensor]) -> None:
        played = self._play(recorded, tensors)
        pairs = [(result, played), *zip(made, self.gradients(), strict=True)]
        worst = max(float((one - other).float().norm() / one.float().norm().clamp(min=1e-12)) for one, other in pairs)
        if not worst <= NEAR:
            self._give_up(f"the first one differs by {worst:.1%} from the pass that it recorded")

    def _give_up(self, why: str) -> None:
        self.works = False
        self.drop()
        self.notify(f"steps are not recorded as CUDA graphs: {why}")

    def drop(self) -> None:
        """Give their memory back; they are recorded again when they are next needed."""
        self._recorded, self._pool = {}, None

    def _record(self, key: Hashable, tensors: Sequence[Tensor], work: Work) -> _Recorded | None:
        size, unpack = layout(tensors)
        inputs = torch.zeros(size, dtype=torch.uint8, device=self.device)
        try:
            replay, result = self.capture(lambda: work(unpack(inputs)))
        except (RuntimeError, MemoryError) as error:
            # an operation that cannot be recorded, or no room
            self._give_up(first_line(error))
            return None
        self._recorded[key] = _Recorded(inputs, unpack, replay, result)
        return self._recorded[key]

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record `work` without doing it: what does it, and where its result will be."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result
