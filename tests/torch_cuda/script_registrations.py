"""Copies with host memory of which only a part is registered: prints what became of each call, as JSON.

A program, since a kernel that were let through to memory which the device cannot reach would end the context, and
with it every test of the process. test_hardware_memory.py runs it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from plans import run_row, runs_tensor
from torch_cuda.hardware import EXECUTOR_NAMES, RegisteredMemory

import kvkernels

PAGE_BYTES = 100_000
REGISTERED_BYTES = 3 << 20  # ends inside block 31
BLOCKS = 60
# Blocks of the host's memory: pinned, pinned up to some byte inside, pageable.
CALLS = {"inside": [3, 30, 0, 17], "across": [30, 31, 32, 2], "outside": [40, 59, 33]}


def outcome(executor: str, direction: str, ids: list[int], ids_place: str) -> str:
    """``right``, ``wrong``, or why it was refused."""
    memory = RegisteredMemory(BLOCKS * PAGE_BYTES // 4096 * 4096 + 4096)
    memory.register(0, REGISTERED_BYTES)
    host = memory.bytes[: BLOCKS * PAGE_BYTES].view(BLOCKS, PAGE_BYTES)
    device = torch.randint(0, 256, (BLOCKS, PAGE_BYTES), dtype=torch.uint8)
    host.copy_(torch.randint(0, 256, host.shape, dtype=torch.uint8))
    sides = (host, device) if direction == "h2d" else (device, host)
    mapping = torch.stack((torch.tensor(ids), torch.arange(len(ids))), 1)
    if direction == "d2h":
        mapping = mapping.flip(1)
    wanted = sides[1].clone()
    wanted[mapping[:, 1]] = sides[0][mapping[:, 0]]
    placed = device.cuda()
    src, dst = (host, placed) if direction == "h2d" else (placed, host)
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            if executor == "swap_blocks_batch":
                rows = [pool.data_ptr() + PAGE_BYTES * mapping[:, i] for i, pool in enumerate((src, dst))]
                kvkernels.swap_blocks_batch(*rows, torch.full((len(ids),), PAGE_BYTES))
            else:
                runs = runs_tensor(run_row((0, 0), (0, 0), PAGE_BYTES, (0, 0)))
                kvkernels.copy_pages([src], [dst], mapping.to(ids_place), runs, executor=executor)
            torch.cuda.synchronize()
    except ValueError as error:
        return str(error)
    finally:
        memory.unregister()
    return "right" if torch.equal(dst.cpu(), wanted) else "wrong"


def main() -> None:
    calls = [(executor, "cpu") for executor in (*EXECUTOR_NAMES, "swap_blocks_batch")] + [("kernel", "cuda")]
    answers = {
        f"{executor} {direction} {name} ids on {ids_place}": outcome(executor, direction, ids, ids_place)
        for executor, ids_place in calls
        for direction in ("h2d", "d2h")
        for name, ids in CALLS.items()
    }
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
