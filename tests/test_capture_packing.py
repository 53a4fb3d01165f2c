"""How pages are packed is learned from the back end's writes, and requests are read by their block tables."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvkernels.capture import CachedLayer, capture_blocks, learn_packing, vllm_layers
from kvkernels.capture.layers import layer_indices
from kvkernels_records.dtypes import bits_of

HEADS, TOKENS, KEY_DIM, VALUE_DIM = 2, 4, 6, 6
PAGE = HEADS * TOKENS * (KEY_DIM + VALUE_DIM)


class BackEnd:
    """Keeps a page in an order drawn at random."""

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        order = torch.randperm(PAGE, generator=torch.Generator().manual_seed(seed))
        keys = HEADS * TOKENS * KEY_DIM
        self.key = order[:keys].reshape(HEADS, TOKENS, KEY_DIM)
        self.value = order[keys:].reshape(HEADS, TOKENS, VALUE_DIM)
        self.scale = scale

    def __call__(self, key, value, cache, slots):
        for row, slot in enumerate(slots.tolist()):
            page = cache[slot // TOKENS].reshape(-1)  # a copy where the cache is padded
            for part, places in ((key, self.key), (value, self.value)):
                page[places[:, slot % TOKENS]] = (part[row] / self.scale).to(cache.dtype)
            cache[slot // TOKENS] = page.reshape(cache.shape[1:])


def cache_of(dtype: torch.dtype, blocks: int = 5, padding: int = 0) -> torch.Tensor:
    rows = torch.zeros(blocks, PAGE + padding, dtype=dtype)
    return rows[:, :PAGE].unflatten(1, (HEADS, TOKENS, KEY_DIM + VALUE_DIM))


@pytest.mark.parametrize("padding", [0, 8])
@pytest.mark.parametrize(
    "dtype,cache_dtype,scale",
    [
        (torch.float32, torch.float32, 1.0),
        (torch.bfloat16, torch.bfloat16, 1.0),
        (torch.bfloat16, torch.float8_e4m3fn, 0.25),
    ],
)
def test_any_order_is_learned(dtype, cache_dtype, scale, padding):
    back_end, cache = BackEnd(3, scale), cache_of(cache_dtype, padding=padding)
    cache.fill_(7)
    before = cache.clone()
    packing = learn_packing(cache, HEADS, KEY_DIM, VALUE_DIM, dtype, back_end, (scale, scale))
    assert torch.equal(packing.key, back_end.key) and torch.equal(packing.value, back_end.value)
    assert torch.equal(cache.view(torch.uint8), before.view(torch.uint8))  # only scratch memory was written


def losing(key, value, cache, slots):
    cache[slots // TOKENS, :, slots % TOKENS, :KEY_DIM] = key


def sharing(key, value, cache, slots):
    for part in (key, value):
        cache[slots // TOKENS, :, slots % TOKENS, :KEY_DIM] += part


def by_count(key, value, cache, slots):
    """Tokens that come alone lie at another place than those that come together."""
    if len(slots) == TOKENS:
        return BackEnd(1)(key, value, cache, slots)
    return BackEnd(2)(key, value, cache, slots)


def astray(key, value, cache, slots):
    BackEnd()(key, value, cache, slots - TOKENS)


@pytest.mark.parametrize(
    "update,text",
    [
        (losing, "must keep each of 48 elements once, got 0"),
        (sharing, "keeps K and V in the same elements"),
        (by_count, "depends on how many tokens come at once"),
        (astray, "writes into another block"),
    ],
)
def test_back_ends_that_cannot_be_read_are_refused(update, text):
    with pytest.raises(ValueError, match=text):
        learn_packing(cache_of(torch.float32), HEADS, KEY_DIM, VALUE_DIM, torch.float32, update)


def written_layer(table: list[int], tokens: int, **changed) -> tuple[CachedLayer, torch.Tensor, torch.Tensor]:
    """A layer whose blocks hold a request's tokens, and the keys and values that were written."""
    back_end, cache = BackEnd(), cache_of(torch.float32, blocks=9)
    draw = torch.Generator().manual_seed(1)
    cache.copy_(torch.randn(cache.shape, generator=draw))
    key, value = (torch.randn(tokens, HEADS, dim, generator=draw) for dim in (KEY_DIM, VALUE_DIM))
    kept = [place for place in range(tokens) if table[place // TOKENS]]
    slots = torch.tensor([table[place // TOKENS] * TOKENS + place % TOKENS for place in kept])
    back_end(key[kept], value[kept], cache, slots)
    packing = learn_packing(cache, HEADS, KEY_DIM, VALUE_DIM, torch.float32, back_end)
    layer = CachedLayer(**{"index": 3, "kind": "full_attention", "group": 1, "block_tokens": TOKENS, "caches": [cache],
                           "packing": packing, **changed})  # fmt: skip
    return layer, key.transpose(0, 1), value.transpose(0, 1)


@pytest.mark.parametrize("tokens", [1, 4, 5, 11, 12])
def test_a_requests_tokens_are_read_in_their_order(tokens):
    table = [7, 2, 5]
    layer, key, value = written_layer(table, 12)
    (found,) = capture_blocks([layer], [[], table], tokens, "during_decode")
    assert (found.layer_index, found.capture_point, found.kind) == (3, "during_decode", "full_attention")
    assert np.array_equal(found.key, key[:, :tokens].numpy()) and np.array_equal(found.value, value[:, :tokens].numpy())


def test_another_blocks_tokens_are_others():
    layer, key, _ = written_layer([7, 2, 5], 12)
    (found,) = capture_blocks([layer], [[], [7, 3, 5]], 12)
    assert (found.key != key.numpy()).any(axis=(0, 2)).tolist() == [False] * 4 + [True] * 4 + [False] * 4


def test_a_capture_does_not_change_when_the_cache_does():
    layer, key, _ = written_layer([7, 2, 5], 12)
    (found,) = capture_blocks([layer], [[], [7, 2, 5]], 12)
    layer.caches[0].zero_()
    assert np.array_equal(found.key, key.numpy())


def test_what_a_sliding_window_gave_up_is_left_out():
    layer, key, _ = written_layer([0, 0, 5], 10, kind="sliding_window")
    (found,) = capture_blocks([layer], [[], [0, 0, 5, 0]], 10)
    assert (found.first_token, found.kind) == (8, "sliding_window")
    assert np.array_equal(found.key, key[:, 8:].numpy())
    with pytest.raises(ValueError, match="holds none of the request's 4 tokens any more"):
        capture_blocks([layer], [[], [0, 0, 5]], 4)


def test_blocks_of_several_kernel_blocks_are_read_whole():
    layer, key, _ = written_layer([6, 7, 2, 3], 13, block_tokens=2 * TOKENS)
    (found,) = capture_blocks([layer], [[], [3, 1]], 13)
    assert np.array_equal(found.key, key.numpy())


def test_a_table_that_is_too_short_is_refused():
    layer, *_ = written_layer([7, 2, 5], 12)
    with pytest.raises(ValueError, match="layer 3 must hold 13 tokens, got a table of 3 blocks of 4"):
        capture_blocks([layer], [[], [7, 2, 5]], 13)


def test_layers_that_do_not_exist_are_refused():
    layer, *_ = written_layer([7], 4)
    with pytest.raises(ValueError, match="layers must be of 3 to 3, got 4"):
        capture_blocks([layer], [[], [7]], 4, wanted=[3, 4])
    assert capture_blocks([layer], [[], [7]], 4, wanted=[3])[0].layer_index == 3


def test_states_and_latents_are_labelled():
    states = [torch.randn(6, 3, 4).bfloat16(), torch.randn(6, 2, 2)]
    latent = torch.randn(6, TOKENS, 5)
    layers = [
        CachedLayer(0, "state", 0, 100, states),
        CachedLayer(1, "mla", 1, TOKENS, [latent]),
    ]
    with pytest.raises(ValueError, match="layer 0 must hold a state, got a table without a block"):
        capture_blocks(layers, [[0, 4], [5, 2]], 7)
    state, mla = capture_blocks(layers, [[4], [5, 2]], 7)
    assert mla.key is None and np.array_equal(mla.parts["latent"][0], latent[[5, 2]].flatten(0, 1)[:7].numpy())
    assert state.kind == "state"


def test_the_state_is_that_of_the_last_block():
    states = [torch.randn(6, 3, 4).bfloat16(), torch.randn(6, 2, 2)]
    (found,) = capture_blocks([CachedLayer(0, "state", 0, 4, states)], [[0, 3, 4, 5]], 11)
    assert np.array_equal(bits_of(found.parts["state0"]), states[0][4].view(torch.uint16).numpy())
    assert np.array_equal(found.parts["state1"], states[1][4].numpy())


def test_quantised_caches_keep_their_dtype_and_scales():
    back_end = BackEnd(scale=0.5)
    cache = cache_of(torch.float8_e4m3fn)
    packing = learn_packing(cache, HEADS, KEY_DIM, VALUE_DIM, torch.float32, back_end, (0.5, 0.5))
    key = torch.randint(-8, 8, (TOKENS, HEADS, KEY_DIM)).float()
    back_end(key, key, cache, torch.arange(TOKENS, 2 * TOKENS))
    layer = CachedLayer(
        0, "full_attention", 0, TOKENS, [cache.view(torch.uint8)], packing, torch.float8_e4m3fn,
        {"key_scale": 0.5, "value_scale": 0.5},
    )  # fmt: skip
    (found,) = capture_blocks([layer], [[1]], TOKENS)
    assert found.key.dtype.names == ("float8_e4m3fn",)
    assert np.array_equal(
        bits_of(found.key), (key / 0.5).to(torch.float8_e4m3fn).view(torch.uint8).transpose(0, 1).numpy()
    )
    assert found.parts["key_scale"].tolist() == found.parts["value_scale"].tolist() == [0.5]


@pytest.mark.parametrize(
    "names,indices",
    [
        (["model.layers.3.attn", "model.layers.10.attn"], [3, 10]),
        (["a.0.b.1.c", "a.0.b.2.c"], [0, 1]),
        (["layers.1.self", "layers.1.cross"], [0, 1]),
        (["first", "second"], [0, 1]),
    ],
)
def test_layers_have_the_numbers_of_their_names(names, indices):
    assert list(layer_indices(names).values()) == indices


def engine(**changed) -> tuple[SimpleNamespace, SimpleNamespace]:
    """As much of vLLM as its layers are found by."""
    back_end, cache = BackEnd(), cache_of(torch.float32)
    impl = SimpleNamespace(
        do_kv_cache_update=lambda layer, key, value, scratch, slots: back_end(key, value, scratch, slots)
    )
    layer = SimpleNamespace(**{"kv_cache": cache, "impl": impl, "kv_cache_dtype": "auto", **changed})
    spec = type("SlidingWindowSpec", (), {"block_size": TOKENS, "num_kv_heads": HEADS, "head_size": KEY_DIM})()
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={"model.layers.4.attn": layer}),
        model_config=SimpleNamespace(dtype=torch.float32),
    )
    return config, SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(layer_names=["model.layers.4.attn"], kv_cache_spec=spec)]
    )


def test_an_engines_layers_are_found():
    (layer,) = vllm_layers(*engine())
    assert (layer.index, layer.kind, layer.group, layer.block_tokens) == (4, "sliding_window", 0, TOKENS)
    assert torch.equal(layer.packing.key, BackEnd().key)


def test_a_back_end_without_an_update_of_its_own_is_refused():
    with pytest.raises(
        ValueError, match="layer 4 must have a back end that updates its cache by itself, got SimpleNamespace"
    ):
        vllm_layers(*engine(impl=SimpleNamespace()))
