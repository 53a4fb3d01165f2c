"""What a mover can be given: an op's call, kept as its arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvkernels import ops
from kvkernels.layout.convert import Caches, as_caches, convert_blocks
from kvkernels.prepared import PreparedCopy, PreparedGroups, SlabbedCopy


class Job(ABC):
    """An op's call. A subclass of your own may make several: they are one transfer."""

    __slots__ = ()

    @abstractmethod
    def call(self) -> None:
        """Make the call, which a mover has checked and kept for later."""

    @abstractmethod
    def written(self) -> tuple[Tensor, ...]:
        """The tensors that it writes to."""


@dataclass(slots=True, eq=False)
class PreparedJob(Job):
    """``copy.run(mapping, layer=layer)`` of a prepared copy."""

    copy: PreparedCopy | SlabbedCopy
    mapping: Tensor
    layer: int | None = None

    def call(self) -> None:
        self.copy.run(self.mapping, layer=self.layer)

    def written(self) -> tuple[Tensor, ...]:
        return self.copy.written()


@dataclass(slots=True, eq=False)
class GroupsJob(Job):
    """``groups.run(mappings)`` of several groups."""

    groups: PreparedGroups
    mappings: Sequence[Tensor | None]

    def call(self) -> None:
        self.groups.run(self.mappings)

    def written(self) -> tuple[Tensor, ...]:
        return self.groups.written()


@dataclass(slots=True, eq=False)
class SwapJob(Job):
    """``swap_blocks`` with these arguments."""

    src: Tensor
    dst: Tensor
    block_size_in_bytes: int
    block_mapping: Tensor
    executor: str = "auto"

    def call(self) -> None:
        ops.swap_blocks(self.src, self.dst, self.block_size_in_bytes, self.block_mapping, self.executor)

    def written(self) -> tuple[Tensor, ...]:
        return (self.dst,)


@dataclass(slots=True, eq=False)
class GatherJob(Job):
    """``gather_blocks`` with these arguments."""

    pools: Sequence[Tensor]
    block_ids: Tensor
    out: Tensor
    executor: str = "auto"

    def call(self) -> None:
        ops.gather_blocks(self.pools, self.block_ids, self.out, self.executor)

    def written(self) -> tuple[Tensor, ...]:
        return (self.out,)


@dataclass(slots=True, eq=False)
class ScatterJob(Job):
    """``scatter_blocks`` with these arguments."""

    buffer: Tensor
    block_ids: Tensor
    pools: Sequence[Tensor]
    executor: str = "auto"

    def call(self) -> None:
        ops.scatter_blocks(self.buffer, self.block_ids, self.pools, self.executor)

    def written(self) -> tuple[Tensor, ...]:
        return tuple(self.pools)


@dataclass(slots=True, eq=False)
class CopyPagesJob(Job):
    """``copy_pages`` with these arguments."""

    src: Sequence[Tensor]
    dst: Sequence[Tensor]
    mapping: Tensor
    runs: Tensor
    src_subblocks_per_block: int = 1
    dst_subblocks_per_block: int = 1
    skip_negative: bool = False
    executor: str = "auto"

    def call(self) -> None:
        ops.copy_pages(
            self.src, self.dst, self.mapping, self.runs, self.src_subblocks_per_block, self.dst_subblocks_per_block,
            self.skip_negative, self.executor,
        )  # fmt: skip

    def written(self) -> tuple[Tensor, ...]:
        return tuple(self.dst)


@dataclass(slots=True, eq=False)
class ConvertJob(Job):
    """``convert_blocks`` with these arguments."""

    src: Caches
    dst: Caches
    mapping: Tensor
    layer: int | None = None
    allow_partial: bool = False
    unit_tokens: int | None = None
    skip_negative: bool = False
    executor: str = "auto"

    def call(self) -> None:
        convert_blocks(
            self.src, self.dst, self.mapping, layer=self.layer, allow_partial=self.allow_partial,
            unit_tokens=self.unit_tokens, skip_negative=self.skip_negative, executor=self.executor,
        )  # fmt: skip

    def written(self) -> tuple[Tensor, ...]:
        return tuple(tensor for cache in as_caches("ConvertJob", "dst", self.dst) for tensor in cache.tensors)
