"""Pretend CUDA: the CPU's arithmetic behind device `cuda`, to find device and dtype mistakes where there is no GPU.

    python pretend_cuda.py build                   # once (g++, ninja); writes into $PRETEND_CUDA_DIR or ./build
    python pretend_cuda.py run script.py ARGS...   # or: run -m pytest ...; run -m emotrain run quickstart --plain

It mixes nothing: an operator that gets CUDA and CPU tensors raises, as on a GPU. Autocast is the real CUDA autocast. It
counts blocking reads, copies and bytes (`pretend_cuda.counts()`), and runs out of memory where a limit is set
(`torch.cuda.set_per_process_memory_fraction`). It proves nothing about CUDA's own kernels, speed or
determinism. PRETEND_FREE_GIB (default 23) is what `mem_get_info` says; PRETEND_BF16=0 makes a card without bf16.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = Path(os.environ.get("PRETEND_CUDA_DIR", HERE / "build"))


def _torch_lib() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "lib"


def build() -> None:
    import torch
    from torch.utils.cpp_extension import include_paths, load

    BUILD.mkdir(parents=True, exist_ok=True)
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    lib = _torch_lib()
    command = ["g++", "-O1", "-shared", "-fPIC", "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
    command += [f"-I{path}" for path in include_paths()] + [str(HERE / "hooks.cpp"), f"-L{lib}", "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, "-o", str(BUILD / "libhooks.so")], check=True)
    ctypes.CDLL(str(BUILD / "libhooks.so"), mode=ctypes.RTLD_GLOBAL)  # which the extension asks for page-locked memory
    load("pretend_ext", [str(HERE / "pretend.cpp")], build_directory=str(BUILD), extra_cflags=["-O1"])


def install() -> None:
    """Must run before torch is imported; once is enough."""
    if "pretend_ext" in sys.modules:
        return
    assert "torch" not in sys.modules, "install() before torch is imported"
    lib = _torch_lib()
    for name in ("libgomp", "libc10.so", "libtorch_cpu.so"):
        for file in lib.glob(f"{name}*"):
            ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    hooks = ctypes.CDLL(str(BUILD / "libhooks.so"), mode=ctypes.RTLD_GLOBAL)
    hooks.pretend_pin.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    hooks.pretend_unpin.argtypes = (ctypes.c_void_p,)
    import torch
    import torch.cuda
    import torch.cuda.amp.common

    sys.path.insert(0, str(BUILD))
    import pretend_ext as ext

    # bitsandbytes looks for its own CUDA library as soon as torch says that there is a GPU
    torch._C._cuda_getCurrentRawStream = lambda index: 0  # type: ignore[attr-defined]

    total, free = 24 * 2**30, int(float(os.environ.get("PRETEND_FREE_GIB", "23")) * 2**30)
    bf16 = os.environ.get("PRETEND_BF16", "1") != "0"
    generator = torch.Generator().manual_seed(3)

    class Stream:
        """All work is done when the call returns: a stream is an order that holds by itself."""

        cuda_stream = 0

        def __init__(self, *args: object, **kwargs: object) -> None:
            pass

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *args: object) -> None:
            pass

        def wait_stream(self, other: object) -> None:
            pass

        def wait_event(self, event: object) -> None:
            pass

        def record_event(self, event: object = None) -> object:
            return event or Event()

        def synchronize(self) -> None:
            pass

        def query(self) -> bool:
            return True

    class Event(Stream):
        def record(self, stream: object = None) -> None:
            pass

        def wait(self, stream: object = None) -> None:
            pass

        def elapsed_time(self, end: object) -> float:
            return 0.0

    class Runtime:
        @staticmethod
        def cudaHostRegister(address: int, size: int, flags: int) -> int:
            hooks.pretend_pin(address, size)
            return 0

        @staticmethod
        def cudaHostUnregister(address: int) -> int:
            hooks.pretend_unpin(address)
            return 0

    class Properties:
        total_memory, major, minor, name, multi_processor_count = total, 8, 9 if bf16 else 0, "Pretend", 128

    cuda = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.set_device = lambda device: None
    cuda.is_bf16_supported = lambda including_emulation=True: bf16
    cuda.mem_get_info = lambda device=None: (free - ext.counts()[4], total)
    cuda.empty_cache = lambda: None
    cuda.synchronize = lambda device=None: None
    cuda.cudart = Runtime
    cuda.Stream, cuda.Event = Stream, Event  # type: ignore[misc]
    cuda.current_stream = cuda.default_stream = lambda device=None: Stream()
    cuda.stream = lambda stream: stream
    cuda.set_per_process_memory_fraction = lambda fraction, device=None: ext.limit(int(fraction * total))
    cuda.reset_peak_memory_stats = lambda device=None: ext.reset_peak()
    cuda.max_memory_reserved = cuda.memory_reserved = lambda device=None: ext.counts()[5]
    cuda.set_sync_debug_mode = lambda mode: None
    cuda.max_memory_allocated = lambda device=None: ext.counts()[5]
    cuda.memory_allocated = lambda device=None: ext.counts()[4]
    cuda.get_device_capability = lambda device=None: (8, 9) if bf16 else (7, 5)
    cuda.get_device_name = lambda device=None: "Pretend"
    cuda.get_device_properties = lambda device=None: Properties
    cuda.get_rng_state_all = lambda: [generator.get_state()]
    cuda.get_rng_state = lambda device=None: generator.get_state()
    cuda.set_rng_state = lambda state, device=None: generator.set_state(state)
    cuda.manual_seed_all = lambda seed: generator.manual_seed(seed)
    cuda.default_generators = (generator,)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.Tensor.record_stream = lambda self, stream: None


def counts() -> dict[str, int]:
    """Blocking reads, copies to and from the device, operators, bytes in use and at the peak, copies that block."""
    import pretend_ext as ext

    names = ("syncs", "h2d", "d2h", "operators", "bytes", "peak_bytes", "pageable")
    return dict(zip(names, ext.counts(), strict=False))


def main() -> None:
    word, *rest = sys.argv[1:] or [""]
    if word == "build":
        build()
    elif word == "run" and rest:
        os.environ["PRETEND_CUDA_DIR"] = str(BUILD)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
        install()
        if rest[0] == "-m":
            sys.argv = rest[1:]
            runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = rest
            runpy.run_path(rest[0], run_name="__main__")
        print(f"pretend cuda: {counts()}", file=sys.stderr)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
