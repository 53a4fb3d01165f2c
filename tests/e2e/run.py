#!/usr/bin/env python3
"""vLLM moves its own KV cache through kvkernels, and every byte is followed there and back.

    make e2e
    make e2e ARGS="--model my-model/ --prompts my-prompts.txt --blocks-per-chunk 2"
    make e2e ARGS="--model llama-bf16 --defect half_a_page"      (must fail)

Without --model or --stress: the README's commands; vLLM's specs as canonical KV caches; the tiny models, each with one
and three blocks a chunk; the stress run; failures; and every seeded defect, which must be found. With either, what it
names.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import sys
import time
import traceback
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from rich.console import Console

from defects import BY_NAME
from report import report
from suite import EXAMPLE, ROOT, SPECS, STRESS_MODEL, TINY_MODELS, Case, default_cases, failure_cases, long_cases

# An engine takes some ten seconds, and many times that beside others.
TIMEOUT_SECONDS = 1200


def engine_processes() -> BaseContext:
    """Processes forked from one that has imported vLLM, which takes as long as a case."""
    # The library as `make build` left it, the example, and this folder.
    paths = [str(path) for path in (ROOT, EXAMPLE, Path(__file__).resolve().parent)]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    # What processes that an engine starts are given is this process's path.
    sys.path[:0] = paths
    # As many engines run as there are cores; and sums in one order give one result.
    os.environ["OMP_NUM_THREADS"] = "1"
    # torch would say for each process that there is no Triton, which the CPU does not need.
    os.environ.setdefault("TORCH_LOGS", "-all")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kvkernels.connectors.vllm", "vllm.v1.worker.cpu_worker", "tiny_models", "engine"])
    return context


def print_to(log: Path) -> None:
    file = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)


def make_models(models: list[str], out: Path) -> None:
    print_to(out / "models.log")
    import tiny_models

    for model in models:
        tiny_models.make(model, str(out / "models" / model))


def run_case(case: Case) -> dict[str, Any]:
    module = importlib.import_module({"promise": "promises"}.get(case.kind, case.kind))
    if case.kind in ("readme", "canonical", "sides"):
        return module.run()
    if case.kind == "stress":
        return module.run(case.folder, case.spec, case.blocks_per_chunk, case.defect)
    if case.kind in ("failures", "promise"):
        arguments = (case.spec, case.mode) if case.kind == "failures" else (case.mode,)
        return module.run(case.folder, *arguments, case.defect)
    if case.kind == "roundtrip":
        # MLA has other formulas for a prompt without a prefix.
        cold_too = case.model in TINY_MODELS and case.model != "deepseek"
        return module.run(case.folder, case.spec, case.blocks_per_chunk, case.prompts, case.defect, cold_too)
    if case.kind == "ttft":
        return module.run(case.folder, case.spec)
    return module.run(case.folder)


def work(case: Case, answer: Path) -> None:
    """The body of a case's process: what it prints goes to its log, its result to a file."""
    print_to(case.log)
    try:
        result = run_case(case)
    except BaseException as error:
        traceback.print_exc()
        result = {"findings": [f"engine: {type(error).__name__}: {error}"]}
    answer.write_text(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    # The engine's exit handlers have nothing left to do, and take seconds.
    os._exit(0)


def run_all(context: BaseContext, cases: list[Case], jobs: int, console: Console) -> None:
    waiting, running, done = list(cases), {}, 0
    while waiting or running:
        while waiting and len(running) < jobs:
            case = waiting.pop(0)
            answer = case.out / f"{case.name}.json"
            answer.unlink(missing_ok=True)
            process = context.Process(target=work, args=(case, answer))
            process.start()
            running[process] = (case, answer, time.monotonic())
        time.sleep(0.05)
        for process, (case, answer, started) in list(running.items()):
            seconds = time.monotonic() - started
            if process.is_alive() and seconds < TIMEOUT_SECONDS:
                continue
            process.kill()
            process.join()
            if process.exitcode == 0 and answer.exists():
                case.result = json.loads(answer.read_text())
            else:
                case.result = {"findings": [f"engine: no answer after {seconds:.0f} s, exit code {process.exitcode}"]}
            del running[process]
            done += 1
            verdict = f"{len(case.findings)} findings" if case.findings else "nothing wrong"
            console.print(f"[{done}/{len(cases)}] {case.name}: {verdict} ({seconds:.1f} s)", markup=False)


def chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    prompts = None
    if arguments.prompts:
        lines = arguments.prompts.read_text().splitlines()
        prompts = [[int(token) for token in line.split()] for line in lines if line.strip()]
    kind, model = ("stress", STRESS_MODEL) if arguments.stress else ("roundtrip", arguments.model)
    cases = [
        Case(kind, model, spec, blocks_per_chunk, arguments.defect, prompts)
        for spec in arguments.spec or SPECS
        for blocks_per_chunk in arguments.blocks_per_chunk or (1, 3)
    ]
    return [Case("stress", model, None), *cases] if arguments.stress else cases


def vllm_version() -> str:
    """By its files, without importing what takes long."""
    namespace: dict[str, Any] = {}
    found = importlib.util.find_spec("vllm")
    exec((Path(found.origin).parent / "_version.py").read_text(), namespace)
    return ".".join(namespace["__version__"].split(".")[:2])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"{', '.join(TINY_MODELS)}, or a folder")
    parser.add_argument("--prompts", type=Path, help="a file with a prompt a line, as token ids")
    parser.add_argument("--spec", choices=SPECS, action="append", help="may come twice; both by default")
    parser.add_argument("--blocks-per-chunk", type=int, action="append", help="may come often; 1 and 3 by default")
    parser.add_argument("--defect", choices=BY_NAME, help="break the copies: the run must fail")
    parser.add_argument("--stress", action="store_true", help=f"the stress run of {STRESS_MODEL}")
    parser.add_argument("--failures", action="store_true", help="copies that fail, resets, sleep, states")
    parser.add_argument("--long", action="store_true", help="engines of several processes: ranks, and the HTTP server")
    parser.add_argument("--only", action="append", metavar="KIND", help="of these the cases of a kind; may come often")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="engines at a time")
    arguments = parser.parse_args()
    model = arguments.model
    if model and model not in TINY_MODELS and not (Path(model) / "config.json").exists():
        parser.error(f"--model must be {', '.join(TINY_MODELS)}, or a folder with a config.json, got {model}")
    if arguments.stress and (arguments.model or arguments.prompts):
        parser.error("--stress has its own model and prompts")
    for option in ("prompts", "spec", "blocks_per_chunk", "defect"):
        if getattr(arguments, option) and not (arguments.model or arguments.stress):
            parser.error(f"--{option.replace('_', '-')} goes with --model")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    console = Console(width=140, record=True)
    started = time.monotonic()
    version = vllm_version()
    out = ROOT / "build" / ("e2e" if version == "0.32" else f"e2e-{version}")
    out.mkdir(parents=True, exist_ok=True)
    chosen = arguments.model or arguments.stress
    if chosen:
        cases = chosen_cases(arguments)
    elif arguments.long:
        cases = long_cases(version)
    else:
        cases = failure_cases(version) if arguments.failures else default_cases(version)
    if arguments.only:
        cases = [case for case in cases if case.kind in arguments.only]
    for case in cases:
        case.out = out
    context = engine_processes()
    models = sorted({case.model for case in cases} & set(TINY_MODELS))
    maker = context.Process(target=make_models, args=(models, out))
    maker.start()
    maker.join()
    if maker.exitcode:
        sys.exit(f"The tiny models could not be made:\n{(out / 'models.log').read_text()}")
    run_all(context, cases, arguments.jobs, console)
    ok = report(cases, not chosen, console)
    seconds = time.monotonic() - started
    console.print(f"vLLM {version}: {len(cases)} cases in {seconds:.0f} s: {'all as it must be' if ok else 'FAILED'}")
    console.save_text(str(out / "report.txt"))
    sys.exit(not ok)


if __name__ == "__main__":
    main()
