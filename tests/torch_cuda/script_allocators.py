"""Every executor on memory of whatever allocator the environment sets for torch: prints what was refused, as JSON.

A program, since torch reads PYTORCH_CUDA_ALLOC_CONF once. test_hardware_memory.py runs it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from torch_cuda.hardware import (
    DIRECTIONS,
    EXECUTOR_NAMES,
    Buffers,
    Shape,
    assert_copied,
    random_mapping,
    scaled,
    whole_pages,
)

import kvkernels

# Pages that are no part of the 2 or 20 MiB by which expandable segments grow: some lie in two of the driver's pieces.
SHAPE = Shape(pools=2, blocks=scaled(60, 6), page_bytes=(1 << 20) + 16)


def main() -> None:
    refused = {}
    for _ in range(2):  # a second time on memory that was given back to the driver
        buffers = Buffers()
        for direction in DIRECTIONS:
            for executor in EXECUTOR_NAMES:
                with torch.cuda.stream(torch.cuda.Stream()):
                    src, dst, pristine = buffers.sides(direction, (SHAPE, SHAPE))
                    mapping = random_mapping(SHAPE.blocks // 2, SHAPE.blocks, SHAPE.blocks)
                    pools = SHAPE.on(src), SHAPE.on(dst)
                    try:
                        kvkernels.copy_pages(*pools, mapping, whole_pages(SHAPE), executor=executor)
                    except ValueError as error:
                        refused[f"{executor} {direction}"] = str(error)
                        mapping = mapping[:0]
                    torch.cuda.synchronize()
                assert_copied(dst, (SHAPE, SHAPE), pristine, mapping, (executor, direction))
        is_expandable = any(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot())
        del buffers, src, dst, pristine, pools
        torch.cuda.empty_cache()
    print(json.dumps({"refused": refused, "is_expandable": is_expandable}))


if __name__ == "__main__":
    main()
