"""What makes equal runs equal: seeds, all global random states as tensors and JSON and back, kernels in fixed order."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emotrain.errors import CheckpointError


def seed_all(seed: int) -> None:
    """Seed every global generator, so that equal runs are equal also where a library draws from one."""
    torch.manual_seed(seed)  # CPU and all devices
    np.random.seed(seed % 2**32)
    random.seed(seed)


def deterministic_kernels(wanted: bool) -> None:
    """On CUDA: only kernels that give the same bits for the same input; call it before CUDA starts.

    By default some add up in the order in which their threads come to an end (atomics): attention's backward pass,
    scattering, some convolutions. cuBLAS needs its workspace's size fixed for it. An operation of torch that has no
    deterministic form raises; kernels of other libraries (bitsandbytes) are not asked. On the CPU nothing is changed.
    """
    if not torch.cuda.is_available():
        return
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a launch a tensor


def capture() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The random states as they are now, without drawing from them.

    Returns:
        Tensors `torch_cpu` uint8 [N], `torch_cuda_<i>` uint8 [N] per device, `torch_mps` uint8 [N]
        where there is one, `numpy_keys` int64 [624]; and a JSON document with the rest.
    """
    tensors = {"torch_cpu": torch.get_rng_state()}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    tensors |= {f"torch_cuda_{index}": state for index, state in enumerate(cuda)}
    if torch.backends.mps.is_available():
        tensors["torch_mps"] = torch.mps.get_rng_state()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors["numpy_keys"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, words, gauss_next = random.getstate()
    document = {
        "cuda_devices": len(cuda),
        "numpy": {
            "name": str(name),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gaussian": float(cached),
        },
        "python": {"version": version, "words": list(words), "gauss_next": gauss_next},
    }
    return tensors, document


@contextmanager
def untouched() -> Iterator[None]:
    """Work after which all global random states are what they were."""
    states, document = capture()
    try:
        yield
    finally:
        restore(states, document)


def restore(tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> tuple[str, ...]:
    """Put back what `capture` took; the last act before the first training draw.

    Returns:
        Lines for the user: where this machine's devices are not those of the capture, so that the
        run goes on but is not bit-identical.

    Raises:
        CheckpointError: a state is missing or malformed; nothing has been changed then.
    """
    try:
        numpy, python = document["numpy"], document["python"]
        keys = tensors["numpy_keys"].numpy().astype(np.uint32)
        numpy_state = (
            str(numpy["name"]),
            keys,
            int(numpy["position"]),
            int(numpy["has_gauss"]),
            float(numpy["cached_gaussian"]),
        )
        python_state = (int(python["version"]), tuple(python["words"]), python["gauss_next"])
        random.Random().setstate(python_state)
        np.random.RandomState().set_state(numpy_state)
        torch.Generator().set_state(tensors["torch_cpu"])
        num_cuda = int(document["cuda_devices"])
        cuda = [tensors[f"torch_cuda_{index}"] for index in range(num_cuda)]
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"random state of the checkpoint is malformed: {error}") from error
    notices = _restore_devices(cuda, tensors.get("torch_mps"))
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    torch.set_rng_state(tensors["torch_cpu"])
    return notices


def _restore_devices(cuda: list[Tensor], mps: Tensor | None) -> tuple[str, ...]:
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index, state in enumerate(cuda[:present]):
        torch.cuda.set_rng_state(state, index)
    has_mps = torch.backends.mps.is_available()
    if mps is not None and has_mps:
        torch.mps.set_rng_state(mps)
    if present == len(cuda) and has_mps == (mps is not None):
        return ()
    was, now = _devices(len(cuda), mps is not None), _devices(present, has_mps)
    return (f"checkpoint is from {was}, this is {now}: the run goes on, but is no longer bit-identical",)


def _devices(num_cuda: int, mps: bool) -> str:
    if num_cuda:
        return f"{num_cuda} CUDA device{'s' if num_cuda > 1 else ''}"
    return "an MPS device" if mps else "a CPU alone"
