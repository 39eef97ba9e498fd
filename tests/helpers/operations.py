"""Which operations of torch some code calls, and the memory that they allocate, on any device, meta included."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Records operations and the storages that they return, except those of the tensors given."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {storage_id(tensor) for tensor in known}
        self.operations: list[str] = []
        """Names of all operations but views; on a GPU most of them are one launch."""
        self.sizes: list[int] = []
        """Bytes of the storage of every tensor that an operation returned."""
        self.most = 0
        """Most bytes that existed at once."""
        self._now = 0
        self._holders: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not is_view(func):
            self.operations.append(str(func))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and storage_id(value) not in self.known:
                storage, nbytes = storage_id(value), value.untyped_storage().nbytes()
                self.sizes.append(nbytes)
                self._now += nbytes if not self._holders[storage] else 0
                self.most = max(self.most, self._now)
                self._holders[storage] += 1
                weakref.finalize(value, self._let_go, storage, nbytes)
        return result

    def _let_go(self, storage: int, nbytes: int) -> None:
        self._holders[storage] -= 1
        self._now -= nbytes if not self._holders[storage] else 0


def storage_id(tensor: torch.Tensor) -> int:
    """A number that names the tensor's storage as long as it exists; meta tensors have no addresses."""
    return tensor.untyped_storage()._cdata


def is_view(func: Any) -> bool:
    """Whether an operation returns an alias of an argument and writes nothing."""
    return any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
