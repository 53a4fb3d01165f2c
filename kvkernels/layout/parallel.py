"""Which part of a model's KV cache a rank holds: tensor, context and pipeline parallelism, in vLLM's order."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import SupportsIndex

from kvkernels.common.arguments import integer

_SIZES = ("tp", "dcp", "pcp", "pp", "interleave")


@dataclass(frozen=True)
class Parallel:
    """A rank among ``tp * pcp * pp``, of a model with ``total_kv_heads`` heads.

    Ranks count tensor parallelism fastest, then prefill context parallelism, then pipeline stages; decode context
    parallelism takes its ranks from tensor parallelism, whose ranks would otherwise hold the same bytes::

        rank = (pp_rank * pcp + pcp_rank) * tp + tp_rank        dcp_rank = tp_rank % dcp

    Tokens are dealt out among the ``dcp * pcp`` context ranks, ``interleave`` at a time: of a block of N tokens, rank
    ``c``'s token ``t`` is token ``(t // interleave * dcp * pcp + c) * interleave + t % interleave`` of the
    ``N * dcp * pcp`` that the ranks' blocks with one id hold together.

    Parameters
    ----------
    tp, dcp, pcp, pp : int
        Sizes, 1 by default. ``dcp`` divides ``tp``.
    rank : int
        This one, below ``tp * pcp * pp``.
    total_kv_heads : int, optional
        Of the whole model. MLA needs none, nor does a model whose heads are not cut (``tp`` 1); of others, pages are
        opaque where it is not said.
    interleave : int
        Consecutive tokens that one context rank gets. It divides the block size; otherwise pages are opaque.
    pcp_deals : bool
        True, and prefill context ranks hold tokens of their own, as above. False, and they add none, as in vLLM from
        0.32 on: they hold the same bytes where ``dcp`` is 1; they are decode's context ranks where ``dcp`` is
        ``pcp``; and where it is ``tp * pcp``, a rank's place is ``tp_rank * pcp + pcp_rank``.

    first_layer, total_layers : int
        Where this stage's layers begin among the whole model's; asked for where one page has several layers and there
        are several stages.

    Raises
    ------
    ValueError
        A size is not positive, the rank is not below their product, or ``dcp`` does not divide what it deals to.

    Examples
    --------
    >>> from kvkernels.layout import Parallel
    >>> one = Parallel(tp=8, dcp=4, pp=2, rank=14)
    >>> one.world, one.tp_rank, one.pp_rank, one.context_rank, one.context_ranks
    (16, 6, 1, 2, 4)
    """

    tp: int = 1
    dcp: int = 1
    pcp: int = 1
    pp: int = 1
    rank: int = 0
    total_kv_heads: int | None = None
    interleave: int = 1
    pcp_deals: bool = True
    first_layer: int = 0
    total_layers: int = 0

    def __post_init__(self) -> None:
        sizes = _SIZES if self.total_kv_heads is None else (*_SIZES, "total_kv_heads")
        for name in (*sizes, "rank", "first_layer", "total_layers"):
            object.__setattr__(self, name, integer(f"Parallel: {name}", getattr(self, name)))
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"Parallel: {name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"Parallel: rank must be below tp * pcp * pp = {self.world}, got {self.rank}")
        if (self.pcp_deals or self.pcp == 1) and self.tp % self.dcp:
            raise ValueError(f"Parallel: dcp must divide tp, got {self.dcp} and {self.tp}")
        if not 0 <= self.first_layer <= self.total_layers:
            layers = f"{self.first_layer} and {self.total_layers}"
            raise ValueError(f"Parallel: first_layer must be in total_layers and not negative, got {layers}")
        spans = (1, self.pcp, self.tp * self.pcp)
        if not self.pcp_deals and self.pcp > 1 and self.dcp not in spans:
            raise ValueError(f"Parallel: dcp must be 1, pcp or tp * pcp without pcp_deals, got {self.dcp} of {spans}")

    @property
    def world(self) -> int:
        """Ranks of the model."""
        return self.tp * self.pcp * self.pp

    @property
    def stage_ranks(self) -> int:
        """Ranks of a pipeline stage, which hold the same layers."""
        return self.tp * self.pcp

    @property
    def tp_rank(self) -> int:
        """Place among the tensor-parallel ranks."""
        return self.rank % self.tp

    @property
    def pcp_rank(self) -> int:
        """Place among the prefill context ranks."""
        return self.rank // self.tp % self.pcp

    @property
    def pp_rank(self) -> int:
        """Pipeline stage."""
        return self.rank // self.stage_ranks

    @property
    def dcp_rank(self) -> int:
        """Place among the decode context ranks."""
        return self.tp_rank % self.dcp if self.pcp_deals else self.context_rank

    @property
    def context_ranks(self) -> int:
        """Ranks among which tokens are dealt out."""
        return self.dcp * self.pcp if self.pcp_deals else self.dcp

    @property
    def context_rank(self) -> int:
        """Place among them."""
        if self.pcp_deals:
            return self.pcp_rank * self.dcp + self.tp_rank % self.dcp
        return (self.tp_rank * self.pcp + self.pcp_rank) % self.dcp


class TensorParallel(Parallel):
    """``Parallel`` in the words of tensor parallelism: a rank among ``size``, of a model with ``total_kv_heads`` heads.

    Further sizes may be given by name; ``rank`` then counts as ``Parallel`` says.

    Examples
    --------
    >>> from kvkernels.layout import TensorParallel
    >>> TensorParallel(3, 8, 2)
    TensorParallel(rank=3, size=8, total_kv_heads=2)
    """

    def __init__(
        self, rank: SupportsIndex, size: SupportsIndex | None = None, total_kv_heads: SupportsIndex | None = None, *,
        dcp: int = 1, pcp: int = 1, pp: int = 1, interleave: int = 1, pcp_deals: bool = True, first_layer: int = 0,
        total_layers: int = 0, tp: SupportsIndex | None = None,
    ) -> None:  # fmt: skip
        given = tp if size is None else size  # dataclasses.replace hands over the fields of Parallel
        rank, size, heads = (
            integer(f"TensorParallel: {name}", value)
            for name, value in (("rank", rank), ("size", given), ("total_kv_heads", total_kv_heads))
        )
        if heads < 1 or size < 1 or not (0 <= rank < size or pcp != 1 or pp != 1):
            raise ValueError(
                "TensorParallel: rank must be below size, and heads positive, got "
                f"TensorParallel(rank={rank}, size={size}, total_kv_heads={heads})"
            )
        super().__init__(size, dcp, pcp, pp, rank, heads, interleave, pcp_deals, first_layer, total_layers)

    @property
    def size(self) -> int:
        """Tensor-parallel ranks."""
        return self.tp

    def __repr__(self) -> str:
        words = [f"rank={self.rank}", f"size={self.tp}", f"total_kv_heads={self.total_kv_heads}"]
        others = [one for one in fields(self) if one.name not in ("tp", "rank", "total_kv_heads")]
        words += [f"{one.name}={getattr(self, one.name)}" for one in others if getattr(self, one.name) != one.default]
        return f"TensorParallel({', '.join(words)})"


@dataclass(frozen=True)
class Share:
    """What a rank holds of a layer: heads, every so many tokens, and which of how many ranks with the same it is."""

    first_head: int
    heads: int
    context_rank: int
    context_ranks: int
    writers: int
    writer_index: int


@lru_cache(maxsize=256)
def share_of(parallel: Parallel, total_heads: int | None, is_dealt: bool) -> Share | None:
    """A rank's share of ``total_heads`` heads, or of what is not cut by heads (None), its tokens dealt out or not.

    None where the ranks of a stage do not hold each head's each token equally often, which all of them are asked for.
    """
    if total_heads is not None and total_heads % parallel.tp and parallel.tp % total_heads:
        return None
    everyone = [_held(parallel, rank, total_heads, is_dealt) for rank in range(parallel.stage_ranks)]
    mine = everyone[parallel.rank % parallel.stage_ranks]
    contexts = parallel.context_ranks if is_dealt else 1
    heads = 1 if total_heads is None else max(1, total_heads // parallel.tp)
    wanted = itertools.product(range(0, total_heads or 1, heads), range(contexts))
    if {everyone.count(part) for part in wanted} != {everyone.count(mine)}:
        return None
    before = everyone[: parallel.rank % parallel.stage_ranks].count(mine)
    return Share(mine[0], heads, mine[1], contexts, everyone.count(mine), before)


def _held(parallel: Parallel, rank: int, total_heads: int | None, is_dealt: bool) -> tuple[int, int]:
    """First head and place among the context ranks of a rank of the first stage."""
    one = Parallel(
        parallel.tp, parallel.dcp, parallel.pcp, 1, rank, parallel.total_kv_heads, parallel.interleave,
        parallel.pcp_deals,
    )  # fmt: skip
    first = 0 if total_heads is None else one.tp_rank * total_heads // parallel.tp
    return first, one.context_rank if is_dealt else 0
