"""One vLLM engine inside this process, so that its blocks, its pools and its connector can be looked at."""

from __future__ import annotations

import gc
import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

os.environ.update(
    # The engine's core in this process.
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    # Nothing is fetched or reported.
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
    # The engine compiles a helper of a few lines otherwise, for four seconds.
    TORCHDYNAMO_DISABLE="1",
)

from tqdm import tqdm
from transformers import AutoConfig
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.distributed.kv_transfer.kv_transfer_state import get_kv_transfer_group
from vllm.inputs import TokensPrompt
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec
from vllm.v1.kv_offload.base import CanonicalKVCaches

# Engines are forked from a process that has imported this file: what is there by now is never garbage, and tqdm's own
# lock would be a semaphore that nobody gives back.
gc.freeze()
tqdm.set_lock(threading.RLock())

Prompt = list[int]
# What an unrestored page is full of: finite in every dtype, since attention multiplies the unused tail of a block by 0,
# and far from any value that a model writes (1.3e7 as bfloat16 or float32).
POISON = 0x4B
NEW_TOKENS = 8


@dataclass
class Answer:
    tokens: list[int]
    # One per token: the log-probability of each candidate.
    logprobs: list[dict[int, float]]
    # Prompt tokens that the engine did not compute.
    cached_tokens: int


def digest(page: torch.Tensor) -> bytes:
    return hashlib.blake2b(page.numpy(), digest_size=16).digest()


def transfer_config(connector: str, extra: dict[str, Any], on_load_failure: str = "recompute") -> KVTransferConfig:
    """What ``--kv-transfer-config`` is given."""
    if connector == "KVKernelsConnector":
        names = {"kv_connector": connector, "kv_connector_module_path": "kvkernels.connectors.vllm"}
    else:
        names = {"kv_connector": "OffloadingConnector"}
        extra = {"spec_name": connector, "spec_module_path": "kvkernels.connectors.vllm", **extra}
    return KVTransferConfig(
        **names, kv_role="kv_both", kv_load_failure_policy=on_load_failure, kv_connector_extra_config=extra
    )


class Engine:
    """A model served with its KV cache offloaded, or without.

    ``connector`` is ``KVKernelsConnector``, ``KVKernelsOffloadingSpec`` under vLLM's own connector, or None.
    """

    def __init__(
        self,
        model: Path,
        connector: str | None,
        *,
        blocks_per_chunk: int = 1,
        host_bytes: int = 1 << 25,
        device_blocks: int = 700,
        max_model_len: int = 3072,
        extra: dict[str, Any] | None = None,
        on_load_failure: str = "recompute",
        **engine_arguments: Any,
    ) -> None:
        config = AutoConfig.from_pretrained(model)
        transfer = None
        if connector is not None:
            given = {"cpu_bytes_to_use": host_bytes, "blocks_per_chunk": blocks_per_chunk, **(extra or {})}
            transfer = transfer_config(connector, given, on_load_failure)
        self.blocks_per_chunk = blocks_per_chunk
        self._keep_kv_caches()
        self.llm = LLM(
            model=str(model.resolve()),
            # As it says itself: left to choose, vLLM serves a float32 model as bfloat16.
            dtype=config.dtype or "auto",
            max_model_len=min(max_model_len, config.get_text_config().max_position_embeddings),
            enforce_eager=True,
            # Off by default where a model has states.
            enable_prefix_caching=True,
            block_size=32,
            num_gpu_blocks_override=device_blocks,
            kv_cache_memory_bytes=1 << 30,
            kv_transfer_config=transfer,
            **engine_arguments,
        )
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.vocabulary = self.llm.model_config.get_vocab_size()
        self.block_pool = self.scheduler.kv_cache_manager.block_pool
        self.update_from_output = self.scheduler.update_from_output
        cache = self.scheduler.kv_cache_config
        # vLLM's numbers of the groups that are offloaded, in the connector's order, and what each consists of.
        self.group_ids = list(cache.prefix_cacheable_group_ids)
        self.groups = [cache.kv_cache_groups[group_id].kv_cache_spec for group_id in self.group_ids]
        self.block_tokens = self.groups[0].block_size
        self.chunk_tokens = self.block_tokens * blocks_per_chunk
        if connector:
            side = get_kv_transfer_group().connector_worker
            self.worker = side.worker
            self.manager = self.scheduler.connector.connector_scheduler.manager
            host_tokens = side.spec.num_chunks // len(self.groups) * self.chunk_tokens
            self.longest_prompt = min(self.llm.model_config.max_model_len - NEW_TOKENS, host_tokens)
        # On a CPU with AMX, vLLM's attention is an illegal instruction until a matrix product of some size has asked
        # the kernel for the use of the tiles: a first prompt of a few tokens would end the process.
        self.generate([[3] * 2 * self.block_tokens], [1])

    def _keep_kv_caches(self) -> None:
        """Notes the tensors and layers that vLLM gives to a worker."""
        init_worker = OffloadingConnectorWorker._init_worker

        def keep_and_init(connector: Any, kv_caches: CanonicalKVCaches) -> None:
            self.device = [cache.tensor for cache in kv_caches.tensors]
            self.layers = kv_caches.group_data_refs
            init_worker(connector, kv_caches)

        OffloadingConnectorWorker._init_worker = keep_and_init

    def generate(self, prompts: list[Prompt], new_tokens: list[int]) -> list[Answer]:
        """Greedy decoding of all prompts together, each for as many tokens as it is given."""
        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            [SamplingParams(max_tokens=count, temperature=0, logprobs=5, ignore_eos=True) for count in new_tokens],
            use_tqdm=False,
        )
        return [
            Answer(
                tokens=list(output.outputs[0].token_ids),
                logprobs=[
                    {token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs
                ],
                cached_tokens=output.num_cached_tokens,
            )
            for output in outputs
        ]

    def finish_stores(self) -> None:
        """A store is submitted in the step after the one that computed its blocks: another request brings that step."""
        self.generate([[5, 4, 3]], [1])

    def forget(self, host_too: bool = False) -> None:
        """Empties the prefix cache, the host pool with it on demand, and overwrites every block on the device."""
        if not self.llm.reset_prefix_cache(reset_connector=host_too):
            raise RuntimeError("vLLM did not reset its prefix cache")
        # The connector keeps vLLM from writing to blocks of which a copy is under way, and cannot know of this.
        host = self.worker.host_worker
        host.wait(list(host._jobs))
        for pages in self.device:
            pages.fill_(POISON)

    def keep_prefix(self, tokens: int) -> None:
        """Forgets the device's cached blocks beyond a prefix; the host pool keeps its own."""
        cached = [block for block in self.block_pool.blocks if block.block_hash is not None]
        self.block_pool.evict_blocks({block.block_id for block in cached if block.block_hash_num_tokens > tokens})

    def known_pages(self) -> dict[bytes, list[bytes]]:
        """Digests of the device's cached blocks, a page of each layer, by vLLM's hash of their tokens and their group.

        No block id and no job of the connector has a part in this: it is what the prefix cache believes to hold.
        """
        return {
            bytes(block.block_hash): self.block_pages(block.block_id, self.group_of(block.block_hash))
            for block in self.block_pool.blocks
            if block.block_hash is not None
        }

    def watch_positions(self) -> dict[tuple[int, int], list[bytes]]:
        """The same by (group, place in the request) for the next single request, filled as it computes its blocks.

        The prefix cache does not keep all of a sliding window's blocks; the request's own table has them while it runs.
        """
        known: dict[tuple[int, int], list[bytes]] = {}
        update = self.update_from_output

        def update_and_look(*arguments: Any) -> Any:
            for request in self.scheduler.running:
                complete = request.num_computed_tokens // self.block_tokens
                tables = self.scheduler.kv_cache_manager.get_block_ids(request.request_id)
                for group, group_id in enumerate(self.group_ids):
                    # A state's block is written again as the request goes on: only its hash says when it stands still.
                    if isinstance(self.groups[group], MambaSpec):
                        continue
                    for place, block_id in enumerate(tables[group_id][:complete]):
                        if block_id and (group, place) not in known:
                            known[group, place] = self.block_pages(block_id, group)
            return update(*arguments)

        self.scheduler.update_from_output = update_and_look
        return known

    def stop_watching(self) -> None:
        self.scheduler.update_from_output = self.update_from_output

    def group_of(self, block_hash: bytes) -> int:
        """A hash ends with vLLM's number of the group."""
        return self.group_ids.index(int.from_bytes(block_hash[-4:], "big"))

    def block_pages(self, block_id: int, group: int) -> list[bytes]:
        return [digest(self.device[ref.tensor_idx][block_id, : ref.page_size_bytes]) for ref in self.layers[group]]

    def loadable_tokens(self, prompt_tokens: int) -> int:
        """How many tokens of a parked prompt vLLM's connector brings back.

        Whole chunks. With a sliding window or a state the last token must be computed anew, so it is not looked up; and
        of a state only the last full block's is kept, which must be the last of a chunk.
        """
        if all(isinstance(group, FullAttentionSpec) for group in self.groups):
            return prompt_tokens // self.chunk_tokens * self.chunk_tokens
        chunks_end = (prompt_tokens - 1) // self.chunk_tokens * self.chunk_tokens
        blocks_end = (prompt_tokens - 1) // self.block_tokens * self.block_tokens
        if any(isinstance(group, MambaSpec) for group in self.groups):
            return chunks_end if chunks_end == blocks_end else 0
        return chunks_end
