#!/usr/bin/env python3
"""Prints docs/layouts_gallery.md: what engines register, as layouts.

Each entry has the layout, and the tensors that the engine allocates, for any number of blocks and layers: the page
shows the layout at a model's size, and the tests hand small tensors of the engine's shape to ``KVCache``.
"""

from __future__ import annotations

from entries import Entry
from of_others import llama_cpp, lmcache, tensorrt_llm
from of_sglang import sglang, sglang_host
from of_vllm import vllm, vllm_latent, vllm_states

from kvkernels import KVCache, KVLayout

SECTIONS = {
    "vLLM 0.32 and 0.33": vllm,
    "vLLM 0.32 and 0.33: MLA and indexers": vllm_latent,
    "vLLM 0.32 and 0.33: states": vllm_states,
    "SGLang 0.5.23 on the device": sglang,
    "SGLang 0.5.23 on the host (HiCache)": sglang_host,
    "TensorRT-LLM": tensorrt_llm,
    "LMCache 0.5.6": lmcache,
    "llama.cpp": llama_cpp,
}

HEAD = """# A gallery of layouts

What engines register, a line of `KVLayout` each, and its picture. Letters are those of [layouts.md](layouts.md);
`N 132` in a shape is a product. [examples/gallery](../examples/gallery) prints this page, and the
tests hand each layout the tensors that the engine allocates. `KVLayout.from_text` reads a printed layout again.
"""


def page() -> str:
    """The page, with 1,024 blocks and 32 layers."""
    lines = [HEAD]
    for section, entries in SECTIONS.items():
        lines.append(f"## {section}\n")
        for one in entries():
            layout = one.layout(1024, 32)
            assert KVLayout.from_text(repr(layout)) == layout
            lines += [f"**{one.title}**: {one.registered}.\n", "```text", repr(layout), "", layout.draw(), "```\n"]
    return "\n".join(lines)


def check(one: Entry, blocks: int = 3, layers: int = 2) -> KVCache:
    """The engine's tensors, small, as a cache of the layout."""
    return KVCache(one.layout(blocks, layers), one.tensors(blocks, layers))


if __name__ == "__main__":
    print(page(), end="")
