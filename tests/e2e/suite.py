"""What is run: each case is one engine in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from defects import BY_NAME, DEFECTS

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "e2e"
EXAMPLE = ROOT / "examples" / "vllm_offload"
SPECS = ("SwapBlocksSpec", "CopyPagesSpec")
TINY_MODELS = ("llama-fp32", "llama-bf16", "gemma3", "qwen3-next")
STRESS_MODEL = "llama-fp32"
STRESS_DEFECTS = ("copy_nothing", "exchange_two_blocks_on_load", "wrong_byte_counts")


@dataclass
class Case:
    kind: str  # "roundtrip", "stress", "readme" or "canonical"
    model: str = ""  # a tiny model's name, or a folder
    spec: str | None = None
    blocks_per_chunk: int = 1
    defect: str | None = None
    prompts: list[list[int]] | None = None
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        if not self.model:
            return self.kind
        parts = [self.kind, Path(self.model).name, self.spec or "no-connector", str(self.blocks_per_chunk), self.defect]
        return "-".join(part for part in parts if part)

    @property
    def folder(self) -> Path:
        return OUT / "models" / self.model if self.model in TINY_MODELS else Path(self.model)

    @property
    def log(self) -> Path:
        return OUT / f"{self.name}.log"

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
        elsewhere = {"pages", "log-probabilities"} if self.kind == "stress" else set()
        return DEFECTS[BY_NAME[self.defect]] - elsewhere - self.failed_checks


def default_cases() -> list[Case]:
    stress = [Case("stress", STRESS_MODEL, None), *(Case("stress", STRESS_MODEL, spec, 2) for spec in SPECS)]
    trips = [Case("roundtrip", model, spec, n) for model in TINY_MODELS for n in (1, 3) for spec in SPECS]
    # Wrong copies with each op; wrong workers need no second one.
    seeded = [Case("roundtrip", "llama-bf16", SPECS[0], 3, defect) for defect in BY_NAME]
    seeded += [Case("roundtrip", "llama-bf16", SPECS[1], 3, defect) for defect in list(BY_NAME)[:4]]
    seeded += [Case("stress", STRESS_MODEL, SPECS[0], 2, defect) for defect in STRESS_DEFECTS]
    return [Case("readme"), Case("canonical"), *stress, *trips, *seeded]
