"""A model's KV goes from one process to another, layout and shards converted on the way, and is proved there.

    python examples/remote/kv.py decode              # terminal 1: waits, checks every byte, says what it saw
    python examples/remote/kv.py prefill             # terminal 2: two tensor-parallel ranks send

Both know a secret, in ``KVKERNELS_REMOTE_SECRET`` or in the file of ``--secret-file``. The pages' values follow from
``--seed``, so that the receiver knows by itself what must come; where it goes and how it is ordered there is compared
by torch's own indexing. ``--flip`` changes a bit of every tenth segment under way, which costs repetitions alone.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time

import torch

from kvkernels import KVCache, KVLayout
from kvkernels.transfer.remote import Peer, RemotePool, sender

RANKS = 2


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=("prefill", "decode"))
    parser.add_argument("--host", default="127.0.0.1", help="where decode listens")
    parser.add_argument("--port", type=int, default=4717)
    parser.add_argument("--secret-file")
    parser.add_argument("--transport", choices=("tcp", "nixl"), default="tcp")
    parser.add_argument("--layers", type=int, default=32, help="32, 8 and 128: Llama-3.1-8B's")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=64, help="of 16 tokens, on each side")
    parser.add_argument("--send", type=int, default=48, help="blocks that are sent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds")
    parser.add_argument("--flip", action="store_true")
    return parser.parse_args()


def values(given: argparse.Namespace) -> torch.Tensor:
    """All of prefill's KV, as bits: ``[layers, 2, blocks, 16 tokens, heads, head size]``."""
    shape = (given.layers, 2, given.blocks, 16, given.heads, given.head_size)
    generator = torch.Generator().manual_seed(given.seed)
    return torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, generator=generator)


def which(given: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefill's blocks, and decode's that they become."""
    generator = torch.Generator().manual_seed(given.seed + 1)
    source, target = (torch.randperm(given.blocks, generator=generator)[: given.send] for _ in range(2))
    return source, target


def sizes(given: argparse.Namespace) -> dict:
    return dict(L=given.layers, K=2, B=given.blocks, N=16, H=given.heads, D=given.head_size, dtype=torch.bfloat16)


def prefill(given: argparse.Namespace) -> bool:
    whole = KVLayout("L | K B N H D", **sizes(given))
    array, (source, _) = values(given), which(given)
    share = given.heads // RANKS
    pools = []
    for rank in range(RANKS):
        mine = array[..., rank * share : (rank + 1) * share, :].contiguous().view(torch.bfloat16)
        cache = KVCache(whole.shard(rank, RANKS), list(mine))
        name, transport = f"prefill rank {rank}", given.transport
        pools.append(RemotePool(cache, name=name, secret_file=given.secret_file, transport=transport, most_retries=100))
    began = time.perf_counter()
    peer, timeout_s = Peer(given.host, given.port), given.timeout
    sent = [pool.send_blocks(peer, "prompt 1", source, timeout_s=timeout_s) for pool in pools]
    results = [one.result() for one in sent]
    seconds = time.perf_counter() - began
    for rank, result in enumerate(results):
        print(f"rank {rank}: {result.outcome}, {result.bytes} bytes, {result.retries} retries, error {result.error}")
    print(f"{sum(result.bytes for result in results) / seconds / 1e9:.2f} GB/s, waiting for decode included")
    for pool in pools:
        pool.close()
    return all(result.outcome == "committed" for result in results)


def decode(given: argparse.Namespace) -> bool:
    layout = KVLayout("B L K H N D", **sizes(given))
    shape = (given.blocks, given.layers, 2, given.heads, 16, given.head_size)
    cache = torch.full(shape, 12345, dtype=torch.int16)
    source, target = which(given)
    pool = RemotePool(
        KVCache(layout, cache.view(torch.bfloat16)), name="decode", secret_file=given.secret_file, host=given.host,
        port=given.port, transport=given.transport, verify="end",
    )  # fmt: skip
    with pool:
        print(f"waiting at {pool.address[0]}:{pool.address[1]}", flush=True)
        result = pool.receive_blocks("prompt 1", target, writers=RANKS, timeout_s=given.timeout).result()
        print(f"{result.outcome}: {result.pages} blocks, {result.bytes} bytes, error {result.error}")
        print(f"segments refused for their sums: {pool.stats()['refused_segments']}")
    if result.outcome != "visible":
        return False
    wanted = values(given)[:, :, source].permute(2, 0, 1, 4, 3, 5)
    others = torch.ones(given.blocks, dtype=torch.bool)
    others[target] = False
    right = torch.equal(cache[target], wanted) and bool((cache[others] == 12345).all())
    print("every value is there, and no other block has changed" if right else "WRONG: the pages are not what was sent")
    return right


def flip() -> None:
    """A network that changes bits: the sums were made before."""
    pack, count = sender.pack, itertools.count()

    def flipped(pools, part, ids, packed):
        sums = pack(pools, part, ids, packed)
        if next(count) % 10 == 0:
            packed[-1, -1] ^= 16
        return sums

    sender.pack = flipped


def main() -> None:
    given = arguments()
    if given.flip:
        flip()
    sys.exit(not {"prefill": prefill, "decode": decode}[given.role](given))


if __name__ == "__main__":
    main()
