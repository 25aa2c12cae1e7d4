"""Text embeddings by text: in memory as far as they fit, the rest read back from the cache.

One T5 embedding of FLUX.1 takes 4 MiB even in 16 bits, so 500 captions with 8 variants each are 16 GiB. What does not
fit is read when a batch asks for it: milliseconds, before a step that takes seconds on models of that size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from emotrain.dataset.cache import Cache, Tensors
from emotrain.errors import ResourceError

DEFAULT_LIMIT = 4 * 2**30  # bytes


class TextRows(Mapping[str, Tensors]):
    """Embeddings per text, without the batch axis; a mapping.

    Args:
        cache: where entries can be read back from.
        limit: bytes kept in memory; texts that the cache could not keep are held above it too.
    """

    def __init__(self, cache: Cache, limit: int = DEFAULT_LIMIT) -> None:
        self.nbytes = 0
        self._cache = cache
        self._limit = limit
        self._held: dict[str, Tensors] = {}
        self._keys: dict[str, str] = {}  # of the texts that are not held

    def add(self, text: str, key: str, row: Tensors) -> None:
        """Take a text's embeddings, whose cache entry is `key`."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in row.values())
        if self.nbytes + size <= self._limit or not self._cache.has("texts", key):
            self._held[text] = row
            self.nbytes += size
        else:
            self._keys[text] = key

    def __getitem__(self, text: str) -> Tensors:
        """The embeddings of a text.

        Raises:
            KeyError: a text that was not added.
            ResourceError: it lay in the cache, and is gone or damaged.
        """
        if text in self._held:
            return self._held[text]
        row = self._cache.get("texts", self._keys[text])
        if row is None:
            message = f"cache {self._cache.folder} was cleared or damaged while a run was using it"
            raise ResourceError(message, "`emotrain resume` encodes the captions again and goes on")
        return row

    def __iter__(self) -> Iterator[str]:
        """All texts."""
        yield from self._held
        yield from self._keys

    def __len__(self) -> int:
        """Number of texts."""
        return len(self._held) + len(self._keys)
