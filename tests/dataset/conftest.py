"""Pictures in bytes, folders of them, and encoders small enough for any machine."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """A picture as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """An RGB picture without two equal rows."""
    digest = b"".join(hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(width * height * 3 // 32 + 1))
    return Image.frombytes("RGB", (width, height), digest[: width * height * 3])


def png_chunk(name: bytes, body: bytes) -> bytes:
    """One chunk with its checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_claiming(width: int, height: int) -> bytes:
    """A PNG header of any size, with hardly any pixels behind it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = png_chunk(b"IHDR", head) + png_chunk(b"IDAT", zlib.compress(b"\0" * 64))
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


def swapped_profile() -> bytes:
    """A minimal matrix profile (ICC.1:2001) whose red is sRGB's blue and whose blue is its red."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    red, green, blue = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)
    name = b"swapped\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + b"\0" * 79,
        b"wtpt": b"XYZ \0\0\0\0" + b"".join(map(number, (0.9642, 1.0, 0.8249))),
        b"cprt": b"text\0\0\0\0none\0",
        b"rXYZ": b"XYZ \0\0\0\0" + b"".join(map(number, blue)),
        b"gXYZ": b"XYZ \0\0\0\0" + b"".join(map(number, green)),
        b"bXYZ": b"XYZ \0\0\0\0" + b"".join(map(number, red)),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), b"curv\x00\x00\x00\x00\x00\x00\x00\x01\x023"),
    }
    table, data, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for key, body in tags.items():
        table += key + struct.pack(">II", offset + len(data), len(body))
        data += body + b"\0" * (-len(body) % 4)
    size = 128 + 4 + len(table) + len(data)
    head = struct.pack(">I4sI4s4s4s", size, b"none", 0x02200000, b"mntr", b"RGB ", b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + b"".join(map(number, (0.9642, 1.0, 0.8249)))
    return head + b"\0" * (128 - len(head)) + struct.pack(">I", len(tags)) + table + data


@pytest.fixture
def make() -> Any:
    """The helpers of this file, since test files cannot import each other."""

    class Helpers:
        encode = staticmethod(encode)
        noise = staticmethod(noise)
        png_chunk = staticmethod(png_chunk)
        png_claiming = staticmethod(png_claiming)
        swapped_profile = staticmethod(swapped_profile)

    return Helpers


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Writes files into a data folder; afterwards every file in it must be as it was written."""
    root = tmp_path / "data"
    root.mkdir()
    written: dict[Path, str] = {}

    def write_named(files: dict[str, bytes | str]) -> Path:
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            data = content.encode() if isinstance(content, str) else content
            path.write_bytes(data)
            written[path] = hashlib.sha256(data).hexdigest()
        return root

    yield write_named
    before = set(written)
    now = {p for p in root.rglob("*") if p.is_file() and not p.is_symlink()}
    assert before <= now, "files are gone from the data folder"
    for path in before:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == written[path], path
    assert now == before, f"files were written into the data folder: {now - before}"


@pytest.fixture
def tiny_family() -> Any:
    """Encoders without a model: latents are means of 8 x 8 pixels, embeddings come from the text's digest."""
    import torch
    from torch import Tensor

    class TinyFamily:
        vae_scale = 8
        pictures_at_once = 1

        def __init__(self) -> None:
            self.pictures = 0
            self.batches: list[tuple[int, ...]] = []
            self.texts: list[str] = []
            self.vae = "vae-1"
            self.text = "text-1"

        def encode_images(self, pixels: Tensor) -> Tensor:
            assert pixels.dtype == torch.float32
            assert pixels.min() >= -1
            assert pixels.max() <= 1
            self.pictures += len(pixels)
            self.batches.append(tuple(pixels.shape))
            means = torch.nn.functional.avg_pool2d(pixels, 8)
            return torch.cat([means, means.mean(1, keepdim=True)], dim=1)

        def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
            self.texts += texts
            rows = [torch.frombuffer(bytearray(hashlib.sha256(t.encode()).digest()), dtype=torch.uint8) for t in texts]
            stacked = torch.stack(rows).float() / 3
            return {"prompt_embeds": stacked.view(-1, 4, 8), "pooled_prompt_embeds": stacked[:, :8]}

        def vae_identity(self) -> str:
            return self.vae

        def text_identity(self) -> str:
            return self.text

    return TinyFamily()
