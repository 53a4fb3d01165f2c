"""How a benchmark's two stretches of memory are divided into pages, and which page goes where."""

from dataclasses import dataclass

import torch

# Between pools and round them: bytes that no copy may touch.
GUARD_BYTES = 4096

# A form is a list of tensors [rows, page bytes], one for each pool.
FORMS = ("pools", "rows")


@dataclass(frozen=True)
class Geometry:
    """``moved`` of the ``blocks`` blocks of each of ``pools`` pools.

    One stretch of memory has room for either form of the pages:

    pools  guard | pool 0: page 0, page 1, ... | guard | pool 1 ... | guard
    rows   guard | pool 0's page, pool 1's page, ... of the first block moved | ... of the second | ...

    ``rows`` is what gather_blocks writes and scatter_blocks reads.
    """

    pools: int
    blocks: int
    page_bytes: int
    moved: int

    @property
    def payload_bytes(self) -> int:
        return self.pools * self.moved * self.page_bytes

    @property
    def flat_bytes(self) -> int:
        return GUARD_BYTES + self.pools * (self.blocks * self.page_bytes + GUARD_BYTES)

    def pool_start(self, pool: int) -> int:
        return GUARD_BYTES + pool * (self.blocks * self.page_bytes + GUARD_BYTES)

    def buffer(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor [moved, pools * page bytes] that gather_blocks writes and scatter_blocks reads."""
        return flat[GUARD_BYTES : GUARD_BYTES + self.payload_bytes].view(self.moved, self.pools * self.page_bytes)

    def form(self, flat: torch.Tensor, form: str) -> list[torch.Tensor]:
        if form == "pools":
            pool_bytes = self.blocks * self.page_bytes
            starts = [self.pool_start(pool) for pool in range(self.pools)]
            return [flat[start : start + pool_bytes].view(self.blocks, self.page_bytes) for start in starts]
        if form == "rows":
            return list(self.buffer(flat).split(self.page_bytes, dim=1))
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")

    def where(self, offset: int) -> str:
        """What the byte at ``offset`` of the pools' form belongs to."""
        pool, within = divmod(offset - GUARD_BYTES, self.blocks * self.page_bytes + GUARD_BYTES)
        if pool < 0 or within >= self.blocks * self.page_bytes:
            return f"guard byte {offset}"
        block, byte = divmod(within, self.page_bytes)
        return f"pool {pool}, block {block}, byte {byte}"


@dataclass(frozen=True)
class Moves:
    """The block ids on either side, int64 on the host: row i goes from ``src[i]`` to ``dst[i]``."""

    src: torch.Tensor
    dst: torch.Tensor

    @property
    def mapping(self) -> torch.Tensor:
        return torch.stack([self.src, self.dst], dim=1)

    def ids(self, form: str, side: str) -> torch.Tensor:
        """The rows that the moved pages have in one form; only pools are addressed by block id."""
        if form == "pools":
            return self.src if side == "src" else self.dst
        return torch.arange(len(self.src))


def random_moves(geometry: Geometry, seed: int = 0) -> Moves:
    """Distinct ids in random order on both sides."""
    generator = torch.Generator().manual_seed(seed)
    src, dst = (torch.randperm(geometry.blocks, generator=generator)[: geometry.moved] for _ in range(2))
    return Moves(src, dst)
