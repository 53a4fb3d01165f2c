"""What is run: each case is one engine in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from defects import BY_NAME, DEFECTS

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "vllm_offload"
SPECS = ("KVKernelsConnector", "KVKernelsOffloadingSpec")
TINY_MODELS = ("llama-fp32", "llama-bf16", "gemma3", "qwen3-next", "gpt-oss", "deepseek")
STRESS_MODEL = "llama-fp32"
STRESS_DEFECTS = ("copy_nothing", "exchange_two_blocks_on_load", "wrong_byte_counts")
# What is made to fail, and the defects of how that is dealt with: the mode that shows them, and what must find them.
FAILURES = ("op", "full", "check", "fail")
FAILURE_DEFECTS = {
    "keys_stay": ("check", {"steps"}),
    "failures_unseen": ("op", {"tokens", "counted"}),
    "nothing_checked": ("check", {"tokens", "counted"}),
}
EXPEDITED_DEFECTS = {"no_second_try": ("expedited", {"tokens"})}
# A promise's model, and what must find which defect of it.
PROMISES = {
    "reset": ("llama-fp32", {"no_fence": {"fence"}}),
    "sleep": ("llama-fp32", {"not_bound_again": {"sleep"}}),
    "states": ("qwen3-next", {"attention_first": {"order"}, "states_stay": {"missing"}}),
    "capacity": ("llama-fp32", {"one_chunk_too_many": {"bytes"}}),
}


@dataclass
class Case:
    # "roundtrip", "stress", "failures", "promise", "policies", "server", "ranks", "capture", "readme" or "canonical"
    kind: str
    model: str = ""  # a tiny model's name, or a folder
    spec: str | None = None
    blocks_per_chunk: int = 1
    defect: str | None = None
    prompts: list[list[int]] | None = None
    mode: str = ""
    out: Path = ROOT / "build" / "e2e"
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        parts = [self.kind, self.mode]
        if self.model:
            parts += [Path(self.model).name, self.spec or "no-connector"]
        if self.kind in ("roundtrip", "stress"):
            parts += [str(self.blocks_per_chunk)]
        return "-".join(part for part in (*parts, self.defect) if part)

    @property
    def folder(self) -> Path:
        return self.out / "models" / self.model if self.model in TINY_MODELS else Path(self.model)

    @property
    def log(self) -> Path:
        return self.out / f"{self.name}.log"

    @property
    def findings(self) -> list[str]:
        """What is wrong, each as ``check: what``."""
        return self.result["findings"]

    @property
    def failed_checks(self) -> set[str]:
        return {finding.split(":")[0] for finding in self.findings}

    @property
    def missed_checks(self) -> set[str]:
        """Those that should have found the seeded defect and did not. The stress run compares bytes and tokens."""
        if self.kind == "failures":
            wanted = {**FAILURE_DEFECTS, **EXPEDITED_DEFECTS}[self.defect][1]
        elif self.kind in ("promise", "policies"):
            wanted = PROMISES[self.mode][1][self.defect]
        else:
            wanted = DEFECTS[BY_NAME[self.defect]]
        elsewhere = {"pages", "log-probabilities"} if self.kind == "stress" else set()
        return wanted - elsewhere - self.failed_checks


def failure_cases(version: str) -> list[Case]:
    """Copies that fail, and promises that are kept; from 0.33 on loads that a step waits for."""
    connector = SPECS[0]
    modes = (*FAILURES, "expedited") if version != "0.32" else FAILURES
    defects = {**FAILURE_DEFECTS, **(EXPEDITED_DEFECTS if version != "0.32" else {})}
    cases = [Case("failures", STRESS_MODEL, None)]
    cases += [Case("failures", STRESS_MODEL, connector, mode=mode) for mode in modes]
    cases += [Case("failures", STRESS_MODEL, connector, defect=name, mode=mode) for name, (mode, _) in defects.items()]
    for mode, (model, broken) in PROMISES.items():
        cases += [Case("promise", model, connector, mode=mode, defect=defect) for defect in (None, *broken)]
    return cases


def default_cases(version: str) -> list[Case]:
    """All of them on 0.32; of what the versions have in common, as much on later ones as shows that it is so."""
    connector, spec = SPECS
    if version != "0.32":
        trips = [Case("roundtrip", model, connector, 1) for model in TINY_MODELS]
        stress = [Case("stress", STRESS_MODEL, None), Case("stress", STRESS_MODEL, connector, 2)]
        return [Case("readme"), Case("sides"), *stress, *trips, *failure_cases(version)]
    stress = [Case("stress", STRESS_MODEL, None), *(Case("stress", STRESS_MODEL, one, 2) for one in SPECS)]
    trips = [Case("roundtrip", model, connector, n) for model in TINY_MODELS for n in (1, 3)]
    trips += [Case("roundtrip", "gemma3", spec, 2)]
    seeded = [Case("roundtrip", "llama-bf16", connector, 3, defect) for defect in BY_NAME]
    seeded += [Case("stress", STRESS_MODEL, connector, 2, defect) for defect in STRESS_DEFECTS]
    captures = [Case("capture", model, connector) for model in TINY_MODELS]
    plain = [Case("readme"), Case("canonical"), Case("sides"), *captures]
    return [*plain, *stress, *trips, *failure_cases(version), *seeded]


def long_cases(version: str) -> list[Case]:
    """Engines of several processes, which start slowly, and times to the first token."""
    ttft = [Case("ttft", "llama-bf16", connector) for connector in (None, SPECS[0])]
    ranks = [Case("ranks", model, SPECS[0]) for model in ("llama-fp32", "deepseek")]
    return [*ttft, Case("server", "llama-fp32", SPECS[0]), *ranks]
