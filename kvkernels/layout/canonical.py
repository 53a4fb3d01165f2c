"""Every engine's KV cache as tensors of ``[num_blocks, page]`` bytes, without a copy: what a transfer needs to know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from kvkernels.common.arguments import integer, shape_text
from kvkernels.layout.forms import known_forms
from kvkernels.layout.mapping import derive_block_mapping, derive_page_mappings
from kvkernels.layout.memory import as_storages, bytes_of_storage, from_storages
from kvkernels.layout.page_runs import CanonicalPageMapping
from kvkernels.layout.parallel import Parallel
from kvkernels.layout.specs import PageFacts, page_facts, spec_of_layer


@dataclass(frozen=True, eq=False)
class CanonicalKVCacheTensor:
    """int8 ``[num_blocks, page_size_bytes]`` on the cache's own memory; a row's stride may exceed it."""

    tensor: Tensor
    page_size_bytes: int


@dataclass(frozen=True)
class CanonicalKVCacheRef:
    """What a layer keeps in a tensor: the first ``page_size_bytes`` of each row, which is its page without padding."""

    tensor_idx: int
    page_size_bytes: int
    mapping: CanonicalPageMapping | None = None


@dataclass(frozen=True, eq=False)
class CanonicalKVCaches:
    """The tensors, each once, and for every group the layers' references to them."""

    tensors: list[CanonicalKVCacheTensor]
    group_data_refs: list[list[CanonicalKVCacheRef]]

    def __copy__(self) -> CanonicalKVCaches:
        return CanonicalKVCaches(self.tensors, self.group_data_refs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Layers that are packed into one storage are so again."""
        pages = [one.page_size_bytes for one in self.tensors]
        return _of_storages, (pages, self.group_data_refs, *as_storages([one.tensor for one in self.tensors]))


def _of_storages(
    pages: Sequence[int], refs: list[list[CanonicalKVCacheRef]], storages: Sequence[Tensor],
    places: Sequence[tuple[Any, ...]],
) -> CanonicalKVCaches:  # fmt: skip
    tensors = from_storages(storages, places)
    return CanonicalKVCaches([CanonicalKVCacheTensor(t, page) for t, page in zip(tensors, pages, strict=True)], refs)


@dataclass(frozen=True)
class _Region:
    """A part of each block, at a constant distance from block to block."""

    of: Tensor = field(compare=False)
    address: int
    page_bytes: int
    row_bytes: int
    num_blocks: int
    used_bytes: int = field(compare=False)

    @property
    def end(self) -> int:
        return self.address + (self.num_blocks - 1) * self.row_bytes + self.page_bytes


def canonicalize(
    kv_caches: Mapping[str, Tensor | Sequence[Tensor]] | Tensor, groups: Sequence[Any], *,
    num_blocks: int | Sequence[int] | None = None, block_dim: int | None = None, parallel: Parallel | None = None,
    tensor_parallel: Parallel | None = None,
) -> CanonicalKVCaches:  # fmt: skip
    """An engine's KV cache as simple pages, whatever its attention backends make of them.

    Parameters
    ----------
    kv_caches : mapping of str to Tensor or sequence of Tensor, or Tensor
        By layer: one tensor; K and V in tensors of their own; or the tensors of a state, which share their storage. A
        single tensor is all layers of one group in one block.
    groups : sequence
        Each with ``layer_names`` and ``kv_cache_spec``: ``KVCacheGroup`` with specs of ``kvkernels.layout.specs``, or
        vLLM's own.
    num_blocks : int or sequence of int, optional
        Blocks that the engine manages, in all groups or one number a group; by default what the spec of a group's first
        layer makes of its tensor. A tensor may have a multiple of it, its kernel blocks being smaller.
    block_dim : int, optional
        The dimension that counts blocks, where a shape leaves it open, as ``[2, 2, ...]`` does.
    parallel, tensor_parallel : Parallel, optional
        This rank's place, by either name: each reference then says how its page lies in the page without parallelism.

    Returns
    -------
    CanonicalKVCaches
        Views of the caches' memory. Layers that share memory share a tensor; a layer whose K and V lie apart has two,
        and one whose heads do, outside the blocks or with other layers between them, one a head.

    Raises
    ------
    ValueError
        A spec is unknown; a tensor's blocks are not what its spec says, or do not lie whole in memory; layers share
        memory and disagree about it.

    Examples
    --------
    >>> import torch
    >>> from kvkernels.layout import canonicalize
    >>> from kvkernels.layout.specs import FullAttention, KVCacheGroup
    >>> spec = FullAttention(block_size=16, num_kv_heads=4, head_size=64, dtype=torch.float16)
    >>> caches = {"layer.0": torch.zeros(2, 10, 16, 4, 64, dtype=torch.float16)}
    >>> canonical = canonicalize(caches, [KVCacheGroup(["layer.0"], spec)])
    >>> [tuple(t.tensor.shape) for t in canonical.tensors], [r.tensor_idx for r in canonical.group_data_refs[0]]
    ([(10, 8192), (10, 8192)], [0, 1])
    """
    if parallel is not None and tensor_parallel is not None:
        raise ValueError("canonicalize: parallel must be given by one name, got tensor_parallel, too")
    parallel = tensor_parallel if parallel is None else parallel
    counts = _counts(num_blocks, len(groups))
    dim = _count_or_none("block_dim", block_dim)
    if isinstance(kv_caches, Tensor):
        return _cross_layer(kv_caches, groups, _Finder(counts[0] if counts else None, dim, None), parallel)
    if not isinstance(kv_caches, Mapping):
        kind = type(kv_caches).__name__
        raise ValueError(f"canonicalize: kv_caches must be a mapping by layer, or one Tensor, got {kind}")
    tensors: dict[_Region, int] = {}
    group_refs: list[list[CanonicalKVCacheRef]] = []
    first_count: int | None = None
    for group, count in zip(groups, counts, strict=True):
        finder = _Finder(count, dim, first_count)
        refs: list[CanonicalKVCacheRef] = []
        for name in group.layer_names:
            if name not in kv_caches:
                raise ValueError(
                    f"canonicalize: kv_caches must have layer {name!r} of the groups, got {sorted(kv_caches)}"
                )
            facts = page_facts(name, spec_of_layer(group, name))
            cache = _checked_cache(name, kv_caches[name])
            regions = finder.regions(name, cache, facts)
            mappings: Sequence[CanonicalPageMapping | None] = [None] * len(regions)
            if parallel is not None:
                sizes = [region.used_bytes for region in regions]
                mappings = derive_page_mappings(cache, facts.spec, sizes, parallel)
            for region, mapping in zip(regions, mappings, strict=True):
                index = tensors.setdefault(region, len(tensors))
                refs.append(CanonicalKVCacheRef(index, region.used_bytes, mapping))
        group_refs.append(refs)
        first_count = finder.num_blocks if first_count is None else first_count
    _check_sharing(list(tensors))
    return CanonicalKVCaches([_view(region) for region in tensors], group_refs)


def _counts(num_blocks: int | Sequence[int] | None, groups: int) -> Sequence[int | None]:
    """Blocks of each group, where given."""
    if not isinstance(num_blocks, (list, tuple)):
        return [_count_or_none("num_blocks", num_blocks)] * groups  # type: ignore[arg-type]
    if len(num_blocks) != groups:
        raise ValueError(f"canonicalize: num_blocks must be one number, or one a group of {groups}, got {num_blocks}")
    return [_count_or_none("num_blocks", count) for count in num_blocks]


def _count_or_none(name: str, value: int | None) -> int | None:
    return None if value is None else integer(f"canonicalize: {name}", value, "an integer from 0 on", least=0)


def _checked_cache(name: str, cache: Tensor | Sequence[Tensor]) -> Tensor | Sequence[Tensor]:
    tensors = [cache] if isinstance(cache, Tensor) else cache
    if not isinstance(tensors, (list, tuple)) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        _fail(repr(name), "be a Tensor or a list of them", type(cache).__name__)
    if any(tensor.device.type not in ("cpu", "cuda") for tensor in tensors):
        _fail(repr(name), "be on the cpu or a cuda device", ", ".join(str(tensor.device) for tensor in tensors))
    if any(hasattr(tensor, "fake_mode") for tensor in tensors):
        _fail(repr(name), "have addresses, which say what layers share", "a fake tensor")
    if any(tensor.dim() == 0 or tensor.numel() == 0 for tensor in tensors):
        _fail(repr(name), "have blocks", ", ".join(map(_geometry, tensors)))
    return cache


def _cross_layer(
    tensor: Tensor, groups: Sequence[Any], finder: _Finder, parallel: Parallel | None
) -> CanonicalKVCaches:
    """All layers of one group in one block."""
    if len(groups) != 1:
        raise ValueError(f"canonicalize: one tensor of all layers must come with one group, got {len(groups)}")
    names = list(groups[0].layer_names)
    if not names:
        raise ValueError("canonicalize: the group of one tensor of all layers must have layers, got none")
    _checked_cache("of all layers", tensor)
    facts = [page_facts(name, spec_of_layer(groups[0], name)) for name in names]
    page = sum(one.page_bytes for one in facts)
    whole = PageFacts(page, page, False, None)
    regions = finder.tensor_regions("of all layers", tensor, whole, page)
    if len(regions) != 1:
        _fail("of all layers", "have blocks outermost", _geometry(tensor))
    mapping = None
    if parallel is not None:
        mapping = derive_block_mapping(tensor, [one.spec for one in facts], page, parallel)
    return CanonicalKVCaches([_view(regions[0])], [[CanonicalKVCacheRef(0, page, mapping)]])


class _Finder:
    """Finds where a layer's blocks lie; the number of blocks, once known, holds for all layers of the group.

    ``usual`` is what other groups have, for a tensor of which the number cannot be told.
    """

    def __init__(self, num_blocks: int | None, block_dim: int | None, usual: int | None) -> None:
        self.num_blocks = num_blocks
        self._block_dim = block_dim
        self._usual = usual

    def regions(self, name: str, cache: Tensor | Sequence[Tensor], facts: PageFacts) -> list[_Region]:
        label = repr(name)
        if facts.is_state:
            return self._state_regions(label, [cache] if isinstance(cache, Tensor) else list(cache), facts)
        if isinstance(cache, Tensor):
            return self.tensor_regions(label, cache, facts, facts.unpadded_page_bytes)
        return self._separate_regions(label, list(cache), facts)

    def tensor_regions(self, label: str, tensor: Tensor, facts: PageFacts, used_bytes: int) -> list[_Region]:
        """One region, or two where K lies wholly before V."""
        total = tensor.numel() * tensor.element_size()
        if self.num_blocks is None:
            if total % used_bytes == 0:
                self.num_blocks = total // used_bytes
            elif self._usual is not None:
                self.num_blocks = self._usual
            else:
                _fail(label, f"have blocks of {used_bytes} bytes, as its spec says", f"{total} bytes in all")
        readings = [_by_dim(tensor, dim, self.num_blocks, facts, used_bytes) for dim in self._block_dims(tensor, facts)]
        found = [regions for regions in readings if regions is not None]
        if len(found) > 1 and any(regions != found[0] for regions in found):
            _fail(label, "have one dimension that counts blocks (block_dim names it)", _geometry(tensor))
        if not found or not found[0]:
            apart = _by_head(tensor, self.num_blocks, facts, used_bytes)
            if apart is not None:
                return apart
            wanted = f"have {self.num_blocks} blocks of {used_bytes} bytes, each in one piece or as K and V"
            _fail(label, wanted, _geometry(tensor))
        return found[0]

    def _block_dims(self, tensor: Tensor, facts: PageFacts) -> list[int]:
        """Dimensions that may count blocks: the one of a shape that is known, or the first two."""
        if self._block_dim is not None:
            if not 0 <= self._block_dim < tensor.dim():
                raise ValueError(
                    f"canonicalize: block_dim must be one of {tensor.dim()} dimensions, got {self._block_dim}"
                )
            return [self._block_dim]
        dims = {letters.index("B") for letters in known_forms(tensor, facts.spec)}
        return sorted(dims) if len(dims) == 1 else list(range(min(tensor.dim(), 2)))

    def _separate_regions(self, label: str, tensors: list[Tensor], facts: PageFacts) -> list[_Region]:
        """K and V in tensors of their own."""
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self.num_blocks is None:
            self.num_blocks = total // facts.unpadded_page_bytes
        regions = []
        for tensor in tensors:
            each = tensor.numel() * tensor.element_size() // max(self.num_blocks, 1)
            own = PageFacts(each, each, False, facts.spec)
            regions += self.tensor_regions(label, tensor, own, each)
        if sum(region.used_bytes for region in regions) != facts.unpadded_page_bytes:
            used = [region.used_bytes for region in regions]
            _fail(label, f"have {facts.unpadded_page_bytes} bytes a block in its tensors, as its spec says", f"{used}")
        return regions

    def _state_regions(self, label: str, states: list[Tensor], facts: PageFacts) -> list[_Region]:
        """The page that the states are parts of; or a region each, where they do not share one."""
        if not states:
            _fail(label, "have the tensors of its state", "none")
        if self.num_blocks is None:
            self.num_blocks = states[0].shape[0]
        regions = []
        for state in states:
            item = state.element_size()
            inside = [(n, s * item) for n, s in zip(state.shape[1:], state.stride()[1:], strict=True)]
            used = _dense_bytes(inside, item)
            if state.dim() == 0 or state.shape[0] != self.num_blocks or used is None:
                _fail(label, f"have {self.num_blocks} blocks, each in one piece", _geometry(state))
            else:
                row = state.stride(0) * item if self.num_blocks > 1 else used
                if row < used:
                    _fail(label, f"have blocks of {used} bytes that do not overlap", _geometry(state))
                regions.append(_Region(state, state.data_ptr(), used, row, self.num_blocks, used))
        total = sum(region.used_bytes for region in regions)
        if total not in (facts.unpadded_page_bytes, facts.page_bytes):
            _fail(label, f"have {facts.unpadded_page_bytes} bytes a block in its state, as its spec says", str(total))
        first, row = regions[0], regions[0].row_bytes
        within = [region.address - first.address for region in regions]
        in_order = within == [sum(r.used_bytes for r in regions[:i]) for i in range(len(regions))]
        one_row = all(region.row_bytes == row for region in regions)
        if in_order and one_row and len({_storage(region.of) for region in regions}) == 1 and total <= row:
            page = min(row, facts.page_bytes)
            return [_Region(first.of, first.address, page, row, self.num_blocks, facts.unpadded_page_bytes)]
        return regions


def _by_dim(tensor: Tensor, dim: int, num_blocks: int, facts: PageFacts, used_bytes: int) -> list[_Region] | None:
    """The regions if this dimension counts blocks, none where pages cannot say them; None if it does not."""
    item = tensor.element_size()
    blocks, step = tensor.shape[dim], tensor.stride(dim) * item
    if num_blocks == 0 or blocks % num_blocks:
        return None
    ratio = blocks // num_blocks
    others = [(n, s * item) for i, (n, s) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)) if i != dim]
    outer = [(n, s) for n, s in others if n > 1 and s >= step * blocks]
    inside_bytes = _dense_bytes([other for other in others if other not in outer], item)
    parts = math.prod(n for n, _ in outer)
    if inside_bytes is None or inside_bytes > step or inside_bytes * ratio * parts != used_bytes:
        return None
    if len(outer) > 1 or parts not in (1, 2) or (ratio > 1 and inside_bytes != step):
        return []
    row = step * ratio
    page = min(row, facts.page_bytes) if parts == 1 else inside_bytes * ratio
    far = outer[0][1] if outer else 0
    begin = tensor.data_ptr()
    return [_Region(tensor, begin + i * far, page, row, num_blocks, used_bytes // parts) for i in range(parts)]


def _by_head(tensor: Tensor, num_blocks: int, facts: PageFacts, used_bytes: int) -> list[_Region] | None:
    """A region a head of ``[B, H, N, C]``, where a head's rows are in one piece and the heads of a block are not::

    L H B N C   | h0: b0 b1 b2 ... | h1: b0 b1 b2 ... |        of each layer
    B H L N C   | b0: h0: l0 l1 ... h1: l0 l1 ... | b1: ...     a layer's heads with other layers between
    """
    heads = getattr(facts.spec, "num_head_slots", None) or getattr(facts.spec, "num_kv_heads", 0)
    if tensor.dim() != 4 or tensor.shape[1] != heads or num_blocks == 0 or tensor.shape[0] % num_blocks:
        return None
    item, ratio = tensor.element_size(), tensor.shape[0] // num_blocks
    block, head = (tensor.stride(i) * item for i in (0, 1))
    rows = [(n, s * item) for n, s in zip(tensor.shape[2:], tensor.stride()[2:], strict=True)]
    row_bytes = _dense_bytes(rows, item)
    if row_bytes is None or row_bytes * ratio * heads != used_bytes or facts.page_bytes != used_bytes:
        return None
    if block < row_bytes or (ratio > 1 and block != row_bytes):
        return None
    begin, page = tensor.data_ptr(), row_bytes * ratio
    return [_Region(tensor, begin + h * head, page, block * ratio, num_blocks, page) for h in range(heads)]


def _dense_bytes(dimensions: list[tuple[int, int]], item: int) -> int | None:
    """Bytes that dimensions of ``(size, step)`` fill without a gap, or None."""
    filled = item
    for size, step in sorted(dimensions, key=lambda dimension: dimension[1]):
        if size != 1 and step != filled:
            return None
        filled *= size
    return filled


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _geometry(tensor: Tensor) -> str:
    return f"shape {shape_text(tensor.shape)} with strides {shape_text(tensor.stride())}"


def _fail(label: str, wanted: str, got: str) -> NoReturn:
    raise ValueError(f"canonicalize: the cache of layer {label} must {wanted}, got {got}")


def _check_sharing(regions: list[_Region]) -> None:
    """Regions that share bytes are one and the same, or somebody is wrong about them."""
    ordered = sorted(regions, key=lambda region: region.address)
    for i, region in enumerate(ordered):
        for other in ordered[i + 1 :]:
            if other.address >= region.end:
                break
            if (
                (other.address, other.row_bytes) == (region.address, region.row_bytes)
                and other != region
                and (other.page_bytes == region.page_bytes)
            ):
                raise ValueError(
                    "canonicalize: layers sharing memory must agree on their blocks, got "
                    f"{region.num_blocks} and {other.num_blocks}"
                )
            distance = other.address - region.address
            if region.row_bytes == other.row_bytes:
                within = distance % region.row_bytes
                if within >= region.page_bytes and region.row_bytes - within >= other.page_bytes:
                    continue
            raise ValueError(
                f"canonicalize: layers sharing memory must agree on their pages, got {region.page_bytes} bytes every "
                f"{region.row_bytes}, and {other.page_bytes} every {other.row_bytes} from byte {distance} on"
            )


def _view(region: _Region) -> CanonicalKVCacheTensor:
    num_blocks = region.num_blocks
    storage = region.of.untyped_storage()
    start = region.address - storage.data_ptr()
    if region.end - storage.data_ptr() > storage.nbytes():
        raise ValueError(
            f"canonicalize: {num_blocks} pages of {region.page_bytes} bytes, padding included, must lie in their "
            f"storage, got one of {storage.nbytes()} bytes"
        )
    view = bytes_of_storage(region.of, start, (num_blocks, region.page_bytes), (region.row_bytes, 1), dtype=torch.int8)
    return CanonicalKVCacheTensor(view, region.page_bytes)
