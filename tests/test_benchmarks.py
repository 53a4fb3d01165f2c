"""The benchmarks on a few MiB: what they write, what they refuse, and that wrong bytes never get a figure."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
MODULES = ("contest", "geometry", "harness", "layouts", "machine", "models", "pages", "plot", "verify")
OPS = ("swap_blocks", "copy_pages", "gather_blocks", "scatter_blocks")

pytest.importorskip("kvkernels._host", reason="the benchmarks need the compiled library")


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def assert_png_with_a_drawing(path: Path) -> None:
    image = importlib.import_module("matplotlib.image").imread(path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(image.shape[:2]) > 300
    assert len({tuple(pixel) for pixel in image[::7, ::7].reshape(-1, image.shape[2]).tolist()}) > 3


@pytest.fixture
def modules(monkeypatch):
    """Imports the benchmarks' modules, which the scripts find beside themselves, and forgets them afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


def test_swap_writes_what_it_measured(tmp_path):
    report, chart = tmp_path / "swap.json", tmp_path / "swap.png"
    done = run_script(
        "swap.py", "--model", "llama-3.1-70b-tp8", "--blocks", 5, "--seconds", 0, "--threads", 1,
        "--json", report, "--plot", chart,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(report.read_text())
    assert [row["op"] for row in result["rows"]] == list(OPS)
    for row in result["rows"]:
        assert row["pools"] == 160 and row["page_bytes"] == 4096 and row["moved_blocks"] == 5
        assert row["payload_bytes"] == 160 * 4096 * 5
        assert row["executor"] == "cpu"
        assert row["share_of_ceiling"] == pytest.approx(row["gb_per_s"] / row["ceiling_gb_per_s"])
        assert row["ratio_to_torch"] == pytest.approx(row["gb_per_s"] / row["torch_gb_per_s"])
        assert row["ratio_to_copy_loop"] == pytest.approx(row["gb_per_s"] / row["copy_loop_gb_per_s"])
        assert all(times["rounds"] >= 3 for times in row["times"].values())
    assert result["checked"] is True
    assert result["machine"]["threads"] == 1
    assert result["machine"]["device"] == "cpu"
    assert "of the buffers on huge pages" in done.stdout.replace("\n", " ")
    assert_png_with_a_drawing(chart)


def test_swap_measures_each_group_of_a_hybrid_model(tmp_path):
    report = tmp_path / "swap.json"
    done = run_script("swap.py", "--model", "gpt-oss-20b", "--blocks", 16, "--seconds", 0, "--json", report)
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert {(row["group"], row["moved_blocks"]) for row in rows} == {("full attention", 16), ("sliding window", 2)}


def test_swap_leaves_out_an_executor_that_cannot_serve_and_says_why(tmp_path):
    report = tmp_path / "swap.json"
    done = run_script(
        "swap.py", "--blocks", 1, "--seconds", 0, "--executor", "cpu", "kernel", "--json", report
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "executor 'kernel' cannot serve this call" in " ".join(done.stdout.split())
    ops = [row["op"] for row in json.loads(report.read_text())["rows"]]
    assert ops == ["swap_blocks", "copy_pages (cpu)", "gather_blocks (cpu)", "scatter_blocks (cpu)"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
@pytest.mark.parametrize("direction", ["h2d", "d2h", "d2d"])
def test_swap_says_why_it_cannot_use_a_device(direction):
    done = run_script("swap.py", "--direction", direction)
    assert done.returncode == 2
    assert f"--direction {direction} needs a CUDA device, and torch sees none" in done.stderr


@pytest.mark.cuda(torch_kernels=True)
@pytest.mark.parametrize("direction", ["h2d", "d2h", "d2d"])
def test_swap_on_a_device(direction, tmp_path):
    report = tmp_path / "swap.json"
    done = run_script("swap.py", "--direction", direction, "--blocks", 8, "--seconds", 0, "--json", report)
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert [row["op"] for row in rows] == list(OPS)
    # Which of them is the policy's affair: tests/torch_cuda/test_link_executors.py.
    assert {row["executor"] for row in rows} <= (
        {"kernel"} if direction == "d2d" else {"kernel", "bulk", "dma", "staged"}
    )


def test_calls_writes_its_table(tmp_path):
    """This tree's package on both sides."""
    done = run_script("calls.py", "--rounds", 2, "--before", Path(__file__).parents[1], "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "calls.json").read_text())
    assert result["after_us"].keys() == result["before_us"].keys()
    assert all(us >= 0 for us in result["after_us"].values())
    text = (tmp_path / "calls.md").read_text()
    assert all(f"| {name} |" in text for name in result["after_us"])


def test_memory_writes_its_table(tmp_path):
    done = run_script("memory.py", "--rounds", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "memory.json").read_text())["figures"]
    assert all(figure > 0 for figure in figures.values())
    text = (tmp_path / "memory.md").read_text()
    assert all(f"| {name} |" in text for name in figures)


def test_pages_writes_its_table(tmp_path):
    done = run_script("pages.py", "--total-mib", 4, "--seconds", 0, "--calls", 3, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "pages.json").read_text())
    lines = {(row["op"], row["pages"], row["threads"]) for row in result["rows"]}
    pages = [(op, page) for page in ("4 KiB", "32 KiB", "512 KiB") for op in ("swap", "gather", "scatter")]
    concats = [("concat", f"{order} TP{tp}") for order in ("NHD", "HND") for tp in (2, 8)]
    assert lines == {(*line, threads) for line in pages + concats for threads in (1, 2)}
    assert all((row["goal_share"] is None) == (row["op"] == "concat") for row in result["rows"])
    assert [cost["unit"] for cost in result["costs"]] == ["us", "us", "ms", "us", "ms"]
    text = (tmp_path / "pages.md").read_text()
    assert text.count("\n| ") == 2 + 2 + len(result["rows"]) + len(result["costs"])
    assert_png_with_a_drawing(tmp_path / "pages.png")


def test_layouts_writes_its_table(tmp_path):
    done = run_script("layouts.py", "--total-mib", 24, "--seconds", 0, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "layouts.json").read_text())
    rows = result["rows"]
    assert len(rows) == 20 and {row["threads"] for row in rows} == {1, 2}
    assert {row["pages"] for row in rows} >= {"128 B", "256 B", "1 KiB", "18 KiB", "32 KiB"}
    assert (tmp_path / "layouts.md").read_text().count("\n| ") == 2 + len(rows) + 2 + len(result["costs"])
    assert_png_with_a_drawing(tmp_path / "layouts.png")


def test_layouts_gives_no_figure_for_wrong_bytes(modules, monkeypatch):
    layouts = modules("layouts")
    memory = [modules("harness").HostMemory(24 << 19) for _ in range(3)]
    right = layouts.convert_blocks

    def forget_a_block(src, dst, mapping):
        right(src, dst, mapping[1:])

    monkeypatch.setattr(layouts, "convert_blocks", forget_a_block)
    with pytest.raises(layouts.WrongBytes, match="convert_blocks wrote other bytes than torch for Llama split TP2"):
        (case,) = [case for case in layouts.CASES if case.name == "Llama split TP2"]
        layouts.measure_case(case, 1, 0.0, memory)


def corrupt_a_moved_byte(geometry, moves, src, dst):
    geometry.form(dst, "pools")[1][moves.dst[2], 17] += 1


def forget_the_last_page(geometry, moves, src, dst):
    geometry.form(dst, "pools")[0][moves.dst[-1]] = 0xA5


def write_past_the_last_pool(geometry, moves, src, dst):
    dst[-geometry.flat_bytes + geometry.pool_start(1) + geometry.blocks * geometry.page_bytes] = 0


def write_a_block_that_no_pair_names(geometry, moves, src, dst):
    free = set(range(geometry.blocks)) - set(moves.dst.tolist())
    geometry.form(dst, "pools")[0][free.pop(), 3] = 0


def change_the_source(geometry, moves, src, dst):
    src[5] += 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (corrupt_a_moved_byte, r"wrote .* pool 1, block \d+, byte 17"),
        (forget_the_last_page, r"wrote 0xa5 where .* pool 0, block \d+"),
        (write_past_the_last_pool, "wrote 0x00 where 0xa5 belongs: guard byte"),
        (write_a_block_that_no_pair_names, r"wrote 0x00 where 0xa5 belongs: pool 0, block \d+, byte 3"),
        (change_the_source, "changed its source"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_check_catches_a_wrong_byte(modules, fault, message):
    contest, geometry_module, harness, verify = map(modules, ("contest", "geometry", "harness", "verify"))
    geometry = geometry_module.Geometry(pools=2, blocks=9, page_bytes=48, moved=6)
    moves = geometry_module.random_moves(geometry)
    src, dst = torch.empty(2, geometry.flat_bytes, dtype=torch.uint8)
    harness.fill_random(src, seed=3)
    side = contest.ours("copy_pages", "auto", 0, geometry, moves, src, dst)
    verifier = verify.Verifier(geometry, moves, src, dst)
    verifier.check(side.name, side.run, side.src_form, side.dst_form)

    def run_with_a_fault():
        side.run()
        fault(geometry, moves, src, dst)

    with pytest.raises(verify.WrongBytes, match=message):
        verifier.check(side.name, run_with_a_fault, side.src_form, side.dst_form)


@pytest.mark.parametrize("page_bytes", [1, 7, 48, 4096])
@pytest.mark.parametrize("op", OPS)
def test_every_side_moves_the_same_bytes(modules, op, page_bytes):
    contest, geometry_module, harness, verify = map(modules, ("contest", "geometry", "harness", "verify"))
    geometry = geometry_module.Geometry(pools=3, blocks=11, page_bytes=page_bytes, moved=8)
    moves = geometry_module.random_moves(geometry)
    src, dst = torch.empty(2, geometry.flat_bytes, dtype=torch.uint8)
    staging = torch.empty(geometry.payload_bytes, dtype=torch.uint8)
    harness.fill_random(src, seed=3)
    verifier = verify.Verifier(geometry, moves, src, dst)
    sides = [
        contest.ours(op, "auto", 0, geometry, moves, src, dst),
        contest.torch_rival(contest.KIND_OF[op], geometry, moves, src, dst, staging),
        contest.copy_loop(contest.KIND_OF[op], geometry, moves, src, dst),
    ]
    for side in sides:
        verifier.check(side.name, side.run, side.src_form, side.dst_form)
    assert len({(side.src_form, side.dst_form) for side in sides}) == 1


def test_sides_take_turns_and_keep_within_the_budget(modules):
    harness = modules("harness")
    ran: list[str] = []
    sides = [harness.Side(name, lambda name=name: ran.append(name), 1000) for name in "abc"]
    shares: list[float] = []
    times = harness.measure(sides, harness.Budget(0.0, min_rounds=40, max_rounds=60), progress=shares.append)
    assert len(ran) == 3 * 41
    rounds = [ran[start : start + 3] for start in range(0, len(ran), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 3
    assert {name: len(side.samples_s) for name, side in times.items()} == dict.fromkeys("abc", 40)
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_sides_must_have_names_of_their_own(modules):
    harness = modules("harness")
    with pytest.raises(ValueError, match="names of their own"):
        harness.measure([harness.Side("a", lambda: None, 1)] * 2, harness.Budget(0.0))


def test_times_count_payload_bytes_once(modules):
    times = modules("harness").Times(bytes=3_000_000_000, samples_s=[1.0, 3.0, 2.0])
    assert times.gb_per_s == pytest.approx(1.5)
    assert times.as_json()["quartiles_ms"] == pytest.approx([1500.0, 2500.0])


def test_page_sizes_are_those_of_the_published_configs(modules):
    models = modules("models")
    pages = {name: [group.page_bytes(16) for group in groups] for name, groups in models.MODELS.items()}
    assert pages == {
        "llama-3.1-8b": [32768],
        "llama-3.1-70b-tp8": [4096],
        "qwen3-32b": [32768],
        "deepseek-v3-mla": [18432],
        "gpt-oss-20b": [16384, 16384],
        "qwen3-next": [16384, 2146304],
    }
    assert models.blocks_for(models.MODELS["llama-3.1-8b"], 16, 256 << 20) == 128


def test_a_chart_without_matplotlib_names_the_extra(modules, monkeypatch):
    plot = modules("plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"kvkernels\[bench\]"):
        plot.require_matplotlib()


def test_pinned_writes_what_it_measured(tmp_path):
    done = run_script("pinned.py", "--gib", 1 / 64, "--rounds", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "pinned.json").read_text())
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["pool_s"] / row["first_touch_s"])
    page = (tmp_path / "pinned.md").read_text()
    assert [line.split(" | ")[0] for line in page.splitlines()[5:]] == [
        f"| {case}" for case in ("pool", "---", 'huge_pages="auto"', "huge_pages=False", 'shared="name"')
    ]


def vllm_file(folder):
    path = folder / "gpu_worker.py"
    path.write_text(
        "import not_there\n\n"
        "def compute_sub_block_ptrs(block_ids, blocks_per_chunk, output, tensor, skip_count=0):\n"
        "    output[:] = tensor.data_ptr() + block_ids.astype(np.uint64) * tensor.stride(0)\n"
    )
    return path


def test_vllm_offload_writes_what_a_submission_costs(tmp_path):
    done = run_script("vllm_offload.py", "--rounds", 2, "--vllm", vllm_file(tmp_path), "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "vllm_offload_cost.json").read_text())
    assert len(found["submissions"]) == 4 and all(us > 0 for us in found["submissions"].values())
    assert "| connector, alone |" in (tmp_path / "out" / "vllm_offload_cost.md").read_text()


def test_mover_writes_its_tables_and_its_picture(tmp_path):
    vllm = vllm_file(tmp_path)
    lmcache = tmp_path / "mem_alloc.py"
    lmcache.write_text(
        "import not_there\n\n"
        "def batched_memcpy(src_ptrs, dst_ptrs, sizes):\n"
        "    for src, dst, size in zip(src_ptrs, dst_ptrs, sizes):\n"
        "        ctypes.memmove(dst, src, size)\n"
    )
    done = run_script(
        "mover.py", "--rounds", 1, "--mib", 8, "--store-mib", 64, "--vllm", vllm, "--lmcache", lmcache,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "mover.json").read_text())
    assert [row["page"] for row in found["rates"]] == [4096, 16384, 32768, 131072, 524288, 2097152]
    assert all(rate > 0 for row in found["rates"] for rate in row.values()) and "LMCache" in found["rates"][0]
    assert " | ratio, LMCache |\n" in done.stdout
    assert [row["blocks"] for row in found["submits"]] == [64, 1000] and found["submits"][0]["vLLM"] > 0
    assert found["waits"]["chunk_ms"] > 0 and found["matmul"]["store_gb_s"] > 0
    assert "| 4 KiB |" in done.stdout and (tmp_path / "out" / "mover.md").read_text() in done.stdout
    assert_png_with_a_drawing(tmp_path / "out" / "mover.png")
