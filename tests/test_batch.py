"""Tensors as bytes: what comes back is what went in."""

from __future__ import annotations

import pytest
import torch

from emotrain import batch


def several() -> list[torch.Tensor]:
    """Of all widths, with no number, one number, and strides of their own."""
    made = torch.Generator().manual_seed(0)
    return [
        torch.randn(3, 5, generator=made), torch.randn(7, generator=made).to(torch.bfloat16),
        torch.tensor(4, dtype=torch.int64),
        torch.tensor([True, False, True]), torch.zeros(0, 2), torch.randn(4, 6, generator=made).t(),
        torch.randn(2, 3, 4, 4, generator=made).to(memory_format=torch.channels_last),
        torch.arange(5, dtype=torch.uint8),
    ]  # fmt: skip


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def test_copies_have_memory_of_their_own() -> None:
    whole = torch.arange(12.0)
    parameters = [torch.nn.Parameter(whole[:6].view(2, 3)), torch.nn.Parameter(whole[6:])]
    for copy, parameter in zip(batch.fetch(parameters), parameters, strict=True):
        assert same(copy, parameter.detach())
        assert copy.untyped_storage().nbytes() == copy.nbytes
        assert copy.data_ptr() != parameter.data_ptr()
        assert not copy.requires_grad


def test_packed_and_unpacked_they_are_the_same() -> None:
    given = sorted(several(), key=lambda tensor: -tensor.element_size())
    for copy, tensor in zip(batch._fetch_packed(given), given, strict=True):
        assert same(copy, tensor)
        assert copy.is_contiguous()
        assert copy.untyped_storage().nbytes() == copy.nbytes


@pytest.mark.parametrize("at_once", [1, 40, 2**20])
def test_they_come_in_pieces_of_a_size(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not on the CPU is packed: here everything is taken for such."""
    pieces = []
    packed = batch._fetch_packed

    def fetch_packed(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        pieces.append(sum(tensor.nbytes for tensor in tensors))
        return packed([torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in tensors])

    monkeypatch.setattr(batch, "AT_ONCE", at_once)
    monkeypatch.setattr(batch, "_fetch_packed", fetch_packed)
    given = [tensor.to("meta") for tensor in several()]
    found = batch.fetch(given)
    assert [(one.shape, one.dtype) for one in found] == [(one.shape, one.dtype) for one in given]
    assert sum(pieces) == sum(tensor.nbytes for tensor in given)
    assert len(pieces) == {1: 8 - 1, 40: len(pieces), 2**20: 1}[at_once] or at_once == 1
    assert all(size <= max(at_once, max(tensor.nbytes for tensor in given)) for size in pieces)
