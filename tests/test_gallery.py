"""The gallery: each layout takes the tensors that its engine allocates, and the page is what its code prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kvkernels import KVLayout, compile_plan, convert_blocks

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "gallery"))

import page as gallery  # noqa: E402

ENTRIES = {f"{section}, {one.title}": one for section, entries in gallery.SECTIONS.items() for one in entries()}
each_entry = pytest.mark.parametrize("name", ENTRIES)


def test_the_page_is_what_its_code_prints():
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "gallery" / "page.py")],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "docs" / "layouts_gallery.md").read_text()


@each_entry
def test_the_engines_tensors_are_a_cache_of_the_layout(name):
    """All of their bytes belong to it, but for what a layout says lies between, and other stages' layers."""
    cache = gallery.check(ENTRIES[name])
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in cache.tensors}.values())
    mine = cache.layout.block_bytes * cache.layout.B
    share = 2 if "pipeline stage" in name else 1
    padding = cache.layout.B * cache.layout.L * 64 if "whole rows" in name else 0
    assert held == mine * share + padding


@each_entry
def test_what_is_printed_is_read_again(name):
    for blocks, layers in ((3, 2), (1024, 32)):
        layout = ENTRIES[name].layout(blocks, layers)
        assert KVLayout.from_text(repr(layout)) == layout == KVLayout.from_text(layout.text)


@each_entry
def test_a_block_comes_back(name):
    """Another block of the engine's cache becomes what one was, by way of pages of the same parts, and nothing changes
    beside it."""
    rng = np.random.default_rng(len(name))
    cache = gallery.check(ENTRIES[name])
    pools = [pool for pool in cache.pools]
    for pool in pools:
        pool.copy_(torch.from_numpy(rng.integers(0, 256, tuple(pool.shape), dtype=np.uint8)))
    before = [pool.clone() for pool in pools]
    again = gallery.check(ENTRIES[name])
    convert_blocks(cache, again, torch.tensor([[2, 0]]))
    convert_blocks(again, cache, torch.tensor([[0, 1]]))
    plan = compile_plan(cache.layout, cache.layout)
    assert plan.bytes == cache.layout.block_bytes
    for pool, was in zip(pools, before, strict=True):
        changed = pool[1] != was[1]
        assert torch.equal(pool[1][changed], was[2][changed])
        assert torch.equal(pool[0], was[0]) and torch.equal(pool[2], was[2])
    assert sum(int((pool[1] == was[2]).sum()) for pool, was in zip(pools, before, strict=True)) >= plan.bytes
