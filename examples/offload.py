#!/usr/bin/env python3
"""Parks a sequence's KV-cache blocks in a host buffer and brings them back under other block ids.

Runs on the CPU as it is; with `--device cuda` the pools are on the GPU and the buffer is pinned.
"""

import argparse

import torch

import kvkernels

LAYERS, BLOCKS, BLOCK_TOKENS, HEADS, HEAD_DIM = 4, 64, 16, 8, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = torch.device(parser.parse_args().device)

    # One pool for K and one for V of each layer: what an engine with the NHD layout allocates.
    shape = (BLOCKS, BLOCK_TOKENS, HEADS, HEAD_DIM)
    pools = [torch.randn(shape, device=device).to(torch.bfloat16) for _ in range(2 * LAYERS)]
    page_bytes = pools[0][0].nbytes

    # gather_blocks packs the pages of all layers, so that a parked block is one row.
    leaving = torch.tensor([17, 3, 42])
    parked = torch.empty(len(leaving), len(pools) * page_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    kvkernels.gather_blocks(pools, leaving, parked)

    # The blocks that the sequence gets later are seldom those that it had.
    returning = torch.tensor([8, 9, 60])
    kvkernels.scatter_blocks(parked, returning, pools)
    if device.type == "cuda":
        torch.cuda.synchronize()

    for pool in pools:
        before, after = pool[leaving.to(device)], pool[returning.to(device)]
        if not torch.equal(before.view(torch.int16), after.view(torch.int16)):
            raise SystemExit("the blocks came back changed")
    explained = kvkernels.explain("scatter_blocks", parked, returning, pools)
    print(f"{parked.nbytes / 1e6:.1f} MB parked and brought back by the {explained.executor} executor")

    try:
        kvkernels.gather_blocks(pools, torch.tensor([17, 64, 42]), parked)
    except IndexError as error:
        print(f"and a wrong id is an error before anything moves: {error}")


if __name__ == "__main__":
    main()
