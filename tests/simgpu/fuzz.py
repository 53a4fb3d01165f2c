"""Random integer kernels as C++ that both nvcc and g++ compile, to compare the simulator with the processor.

A kernel is a row of phases on one thread's variables, with block- and warp-wide steps between them:

    phase 0 ─ shuffle ─ phase 1 ─ shared memory and barrier ─ phase 2 ─ vote ─ …

On the device a thread runs them in order; on the host each phase runs for all threads of a block before the next, and
the steps between are written out over the block's threads, from CUDA's programming guide. Nothing here is undefined in
C++: arithmetic is unsigned, shifts are masked, divisors are not zero.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

THREADS = 96
BLOCKS = 3
INPUT_BYTES = 4096
OUTPUT_BYTES = 128  # a thread

# Variables by type; each has three.
TYPES = ("uint8_t", "int8_t", "uint16_t", "int16_t", "uint32_t", "int32_t", "uint64_t", "int64_t")
LETTERS = "abcdefgh"
VARIABLES = {f"{letter}{i}": type_ for letter, type_ in zip(LETTERS, TYPES, strict=True) for i in range(3)}
WIDE = ("uint32_t", "uint64_t")
EDGES = (0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 63, 64, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF,
         0x80000000, 0xFFFFFFFF, 0x100000000, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF)  # fmt: skip


@dataclass
class Source:
    text: str
    names: list[str]


class _Writer:
    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed}/{number}")
        self.number = number
        self.depth = 0
        self.loops = 0

    # Expressions, all of them unsigned 32 or 64 bits wide.

    def variable(self) -> str:
        return self.random.choice(list(VARIABLES))

    def constant(self, type_: str) -> str:
        value = self.random.choice(EDGES) if self.random.random() < 0.7 else self.random.getrandbits(64)
        return f"static_cast<{type_}>({value}ull)"

    def leaf(self, type_: str) -> str:
        r = self.random.random()
        if r < 0.15:
            return self.constant(type_)
        if r < 0.3:
            return self.load(type_)
        # A cast to an unsigned type extends by the variable's own sign.
        return f"static_cast<{type_}>(t.{self.variable()})"

    def load(self, type_: str) -> str:
        """At a random place of the input, in any width."""
        read = self.random.choice(TYPES)
        return f"static_cast<{type_}>(read<{read}>(in, U32(t.{self.variable()})))"

    def expression(self, type_: str, depth: int) -> str:
        if depth == 0:
            return self.leaf(type_)
        x, y = (lambda: self.expression(type_, depth - 1)), (lambda: self.expression(type_, depth - 1))
        bits = 32 if type_ == "uint32_t" else 64
        signed = f"int{bits}_t"
        r = self.random.randrange(22)
        if r < 5:
            return f"({x()} {self.random.choice('+-*&|^+-')} {y()})"
        if r == 5:
            return f"({x()} << ({y()} & {bits - 1}))"
        if r == 6:
            return f"({x()} >> ({y()} & {bits - 1}))"
        if r == 7:
            return f"static_cast<{type_}>(static_cast<{signed}>({x()}) >> ({y()} & {bits - 1}))"
        if r == 8:
            return f"({x()} {self.random.choice('/%')} ({y()} | 1))"
        if r == 9:
            divisor = f"(static_cast<{signed}>({y()} & 0x7fff) + 1)"
            return f"static_cast<{type_}>(static_cast<{signed}>({x()}) {self.random.choice('/%')} {divisor})"
        if r == 10:
            return f"({self.condition(depth - 1)} ? {x()} : {y()})"
        if r == 11:
            return f"pick_{self.random.choice(('min', 'max'))}<{self.random.choice((type_, signed))}>({x()}, {y()})"
        if r == 12:
            return f"static_cast<{type_}>(t.local[({x()}) & 7])"
        if r in (13, 14):
            narrow = self.random.choice(TYPES)
            return f"static_cast<{type_}>(static_cast<{narrow}>({x()}))"
        if r == 15:
            return f"(~{x()})"
        if r == 16:
            return f"(0 - {x()})"
        if r == 17:
            return f"static_cast<{type_}>(helper_{self.number}(t, U64({x()}), U32({y()})))"
        return self.intrinsic(type_, depth)

    def intrinsic(self, type_: str, depth: int) -> str:
        def x32() -> str:
            return self.expression("uint32_t", depth - 1)

        def x64() -> str:
            return self.expression("uint64_t", depth - 1)

        forms = [
            lambda: f"__popc({x32()})", lambda: f"__popcll({x64()})", lambda: f"__clz({x32()})",
            lambda: f"__clzll({x64()})", lambda: f"__ffs({x32()})", lambda: f"__ffsll({x64()})",
            lambda: f"__brev({x32()})", lambda: f"__brevll({x64()})", lambda: f"__umulhi({x32()}, {x32()})",
            lambda: f"__mulhi(static_cast<int32_t>({x32()}), static_cast<int32_t>({x32()}))",
            lambda: f"__umul64hi({x64()}, {x64()})",
            lambda: f"__mul64hi(static_cast<int64_t>({x64()}), static_cast<int64_t>({x64()}))",
            lambda: f"__umul24({x32()}, {x32()})", lambda: f"__usad({x32()}, {x32()}, {x32()})",
            lambda: f"__byte_perm({x32()}, {x32()}, {x32()} & 0x7777)",
            lambda: f"__byte_perm({x32()}, {x32()}, {self.random.getrandbits(16) & 0x7777})",
            lambda: f"__funnelshift_{self.random.choice(('l', 'r', 'lc', 'rc'))}({x32()}, {x32()}, {x32()} & 63)",
            lambda: f"__dp4a(U32({x32()}), U32({x32()}), U32({x32()}))",
            lambda: f"(({x64()} >> ({x32()} & 63)) & ((1ull << ({x32()} & 31)) - 1))",
            lambda: f"U64((static_cast<Wide>({x64()}) * {x64()} + {x64()}) >> {self.random.randrange(99)})",
        ]  # fmt: skip
        return f"static_cast<{type_}>({self.random.choice(forms)()})"

    def condition(self, depth: int) -> str:
        type_ = self.random.choice(WIDE)
        signed = type_.removeprefix("u")
        compare = self.random.choice(("<", "<=", ">", ">=", "==", "!="))
        as_type = self.random.choice((type_, signed))
        left, right = self.expression(type_, depth), self.expression(type_, max(0, depth - 1))
        plain = f"(static_cast<{as_type}>({left}) {compare} static_cast<{as_type}>({right}))"
        if depth > 0 and self.random.random() < 0.3:
            return f"({plain} {self.random.choice(('&&', '||', '!='))} {self.condition(depth - 1)})"
        return plain

    # Statements.

    def assign(self) -> str:
        name = self.variable()
        value = self.expression(self.random.choice(WIDE), self.random.choice((1, 1, 2)))
        return f"t.{name} = static_cast<{VARIABLES[name]}>({value});"

    def statement(self) -> str:
        r = self.random.random()
        if self.depth >= 2 or r < 0.5:
            return self.assign()
        if r < 0.6:
            return f"t.local[U32(t.{self.variable()}) & 7] = U64({self.expression('uint64_t', 1)});"
        if r < 0.68:
            type_ = self.random.choice(TYPES)
            value = f"static_cast<{type_}>({self.expression('uint64_t', 1)})"
            return f"write<{type_}>(out, U32(t.{self.variable()}), {value});"
        self.depth += 1
        try:
            return self.branch(r)
        finally:
            self.depth -= 1

    def body(self) -> str:
        return " ".join(self.statement() for _ in range(self.random.randint(1, 2)))

    def branch(self, r: float) -> str:
        if r < 0.82:
            other = f" else {{ {self.body()} }}" if self.random.random() < 0.6 else ""
            return f"if ({self.condition(1)}) {{ {self.body()} }}{other}"
        if r < 0.92:
            self.loops += 1
            i = f"i{self.loops}"
            leave = self.random.choice(("", f"if ({self.condition(0)}) break;", f"if ({self.condition(0)}) continue;"))
            count = f"(U32(t.{self.variable()}) & {self.random.choice((3, 7))})"
            return f"for (uint32_t {i} = 0; {i} < {count} + 1; ++{i}) {{ if ({i} > 9) break; {leave} {self.body()} }}"
        cases = " ".join(f"case {i}: {self.body()} {'break;' if self.random.random() < 0.8 else ''}" for i in range(4))
        return f"switch (U32(t.{self.variable()}) % 6) {{ {cases} default: {self.assign()} }}"

    # Steps between phases: device code, and the same over all threads of a block on the host.

    def step(self) -> tuple[str, str]:
        kind = self.random.choice(("shfl", "shfl", "vote", "shared", "shared", "atomic", "count", "match", "reduce"))
        return getattr(self, f"step_{kind}")()

    def u32s(self) -> str:
        return self.random.choice([name for name, type_ in VARIABLES.items() if type_ == "uint32_t"])

    def step_shfl(self) -> tuple[str, str]:
        mode = self.random.choice(("idx", "up", "down", "xor"))
        to, value, lane = self.u32s(), self.u32s(), self.u32s()
        width = 32 if mode == "xor" else self.random.choice((2, 4, 8, 16, 32))
        function = {"idx": "__shfl_sync", "up": "__shfl_up_sync", "down": "__shfl_down_sync", "xor": "__shfl_xor_sync"}[
            mode
        ]
        # The distance is the same in all lanes, or any for idx.
        distance = f"(t.{lane} & 31)" if mode == "idx" else str(self.random.randrange(32))
        source = {
            "idx": f"(lane & ~{width - 1}) + (block[i].{lane} & {width - 1})",
            "up": f"(int)(lane & {width - 1}) - {distance} < 0 ? lane : lane - {distance}",
            "down": f"(lane & {width - 1}) + {distance} > {width - 1} ? lane : lane + {distance}",
            "xor": f"lane ^ {distance}",
        }[mode]
        device = f"t.{to} = {function}(0xffffffff, t.{value}, {distance}, {width});"
        host = (
            f"for (uint32_t i = 0; i < {THREADS}; ++i) {{ const uint32_t lane = i & 31; "
            f"next[i].{to} = block[(i & ~31u) + ({source})].{value}; }} block = next;"
        )
        return device, host

    def step_vote(self) -> tuple[str, str]:
        to, value = self.u32s(), self.variable()
        mode = self.random.choice(("ballot", "any", "all"))
        device = f"t.{to} = U32(__{mode}_sync(0xffffffff, (t.{value} & 3) != 0));"
        vote = f"U32((block[(i & ~31u) + j].{value} & 3) != 0)"
        ballot = f"uint32_t v = 0; for (uint32_t j = 0; j < 32; ++j) v |= {vote} << j;"
        result = {"ballot": "v", "any": "v != 0", "all": "v == 0xffffffff"}[mode]
        return device, f"for (uint32_t i = 0; i < {THREADS}; ++i) {{ {ballot} next[i].{to} = {result}; }} block = next;"

    def step_match(self) -> tuple[str, str]:
        to, value = self.u32s(), self.u32s()
        device = f"t.{to} = __match_any_sync(0xffffffff, t.{value} & 7);"
        host = (
            f"for (uint32_t i = 0; i < {THREADS}; ++i) {{ uint32_t v = 0; for (uint32_t j = 0; j < 32; ++j) "
            f"v |= U32((block[(i & ~31u) + j].{value} & 7) == (block[i].{value} & 7)) << j; "
            f"next[i].{to} = v; }} block = next;"
        )
        return device, host

    def step_reduce(self) -> tuple[str, str]:
        to, value = self.u32s(), self.u32s()
        mode, update = self.random.choice(
            (("add", "v += x"), ("xor", "v ^= x"), ("or", "v |= x"), ("max", "v = x > v ? x : v"))
        )
        device = f"t.{to} = __reduce_{mode}_sync(0xffffffff, t.{value});"
        host = (
            f"for (uint32_t i = 0; i < {THREADS}; ++i) {{ uint32_t v = 0; for (uint32_t j = 0; j < 32; ++j) "
            f"{{ const uint32_t x = block[(i & ~31u) + j].{value}; {update}; }} next[i].{to} = v; }} block = next;"
        )
        return device, host

    def step_shared(self) -> tuple[str, str]:
        """Each thread writes its cell, and reads another's after a barrier."""
        to, value, cell = self.variable(), self.variable(), self.u32s()
        type_ = self.random.choice(TYPES)
        read = f"static_cast<{VARIABLES[to]}>"
        device = (
            f"{{ {type_}* cells = reinterpret_cast<{type_}*>(shared); "
            f"cells[t.index % {THREADS}] = static_cast<{type_}>(t.{value}); "
            f"__syncthreads(); t.{to} = {read}(cells[t.{cell} % {THREADS}]); __syncthreads(); }}"
        )
        host = (
            f"for (uint32_t i = 0; i < {THREADS}; ++i) "
            f"next[i].{to} = {read}(static_cast<{type_}>(block[block[i].{cell} % {THREADS}].{value})); "
            "block = next;"
        )
        return device, host

    def step_atomic(self) -> tuple[str, str]:
        to, value = self.u32s(), self.u32s()
        name, start, update = self.random.choice((
            ("atomicAdd", "0u", "v += x"), ("atomicMax", "0u", "v = x > v ? x : v"),
            ("atomicMin", "~0u", "v = x < v ? x : v"),
            ("atomicAnd", "~0u", "v &= x"), ("atomicOr", "0u", "v |= x"), ("atomicXor", "0u", "v ^= x"),
        ))  # fmt: skip
        device = (
            f"{{ uint32_t* cell = reinterpret_cast<uint32_t*>(shared); "
            f"if (t.index % {THREADS} == 0) *cell = {start}; __syncthreads(); "
            f"{name}(cell, t.{value}); __syncthreads(); t.{to} = *cell; __syncthreads(); }}"
        )
        host = (
            f"{{ uint32_t v = {start}; "
            f"for (uint32_t i = 0; i < {THREADS}; ++i) {{ const uint32_t x = block[i].{value}; {update}; }} "
            f"for (uint32_t i = 0; i < {THREADS}; ++i) next[i].{to} = v; block = next; }}"
        )
        return device, host

    def step_count(self) -> tuple[str, str]:
        to, value = self.u32s(), self.variable()
        mode = self.random.choice(("count", "and", "or"))
        device = f"t.{to} = U32(__syncthreads_{mode}((t.{value} & 1) != 0));"
        result = {"count": "v", "and": f"v == {THREADS}", "or": "v != 0"}[mode]
        host = (
            f"{{ uint32_t v = 0; for (uint32_t i = 0; i < {THREADS}; ++i) v += U32((block[i].{value} & 1) != 0); "
            f"for (uint32_t i = 0; i < {THREADS}; ++i) next[i].{to} = {result}; block = next; }}"
        )
        return device, host

    # A kernel.

    def kernel(self) -> str:
        phases = [self.body() for _ in range(self.random.randint(2, 4))]
        steps = [self.step() for _ in phases[1:]]
        n = self.number
        inline = self.random.choice(("", "NOINLINE"))
        helper = (
            f"BOTH {inline} uint64_t helper_{n}(const Thread& t, uint64_t x, uint32_t y) "
            f"{{ if ((x & 3) == 1) return x * t.{self.variable()}; "
            f"return (x >> (y & 63)) ^ U64(t.{self.variable()}); }}\n"
        )
        functions = "".join(
            f"BOTH void phase_{n}_{i}(Thread& t, const uint8_t* in, uint8_t* out) {{ {phase} }}\n"
            for i, phase in enumerate(phases)
        )
        call = [f"phase_{n}_{i}(t, in, mine);" for i in range(len(phases))]
        device = call[0] + "".join(f"\n  {step[0]}\n  {next_}" for step, next_ in zip(steps, call[1:], strict=True))
        each = [
            f"for (uint32_t i = 0; i < {THREADS}; ++i) "
            f"phase_{n}_{phase}(block[i], in, out + (b * {THREADS} + i) * {OUTPUT_BYTES}); next = block;"
            for phase in range(len(phases))
        ]
        host = each[0] + "".join(f"\n    {step[1]}\n    {next_}" for step, next_ in zip(steps, each[1:], strict=True))
        return f"""{helper}{functions}
#ifdef __CUDACC__
extern "C" __global__ void kernel_{n}(const uint8_t* in, uint8_t* out) {{
  __shared__ uint64_t shared[{THREADS}];
  (void)shared;
  Thread t = start(in, blockIdx.x * blockDim.x + threadIdx.x);
  uint8_t* mine = out + t.index * {OUTPUT_BYTES};
  {device}
  finish(t, mine);
}}
#else
extern "C" void kernel_{n}(const uint8_t* in, uint8_t* out) {{
  for (uint32_t b = 0; b < {BLOCKS}; ++b) {{
    std::vector<Thread> block({THREADS});
    for (uint32_t i = 0; i < {THREADS}; ++i) block[i] = start(in, b * {THREADS} + i);
    std::vector<Thread> next = block;
    {host}
    for (uint32_t i = 0; i < {THREADS}; ++i) finish(block[i], out + (b * {THREADS} + i) * {OUTPUT_BYTES});
  }}
}}
#endif
"""


def _helpers() -> str:
    starts = "\n  ".join(
        f"t.{name} = read<{type_}>(in, index * 37 + {8 * i});" for i, (name, type_) in enumerate(VARIABLES.items())
    )
    ends = "\n  ".join(f"sum = sum * 31 + U64(t.{name});" for name in VARIABLES)
    return f"""
BOTH Thread start(const uint8_t* in, uint32_t index) {{
  Thread t;
  t.index = index;
  {starts}
  for (int i = 0; i < 8; ++i) t.local[i] = index * 1000003u + i;
  return t;
}}
BOTH void finish(const Thread& t, uint8_t* out) {{
  uint64_t sum = 0;
  {ends}
  for (int i = 0; i < 8; ++i) sum = sum * 31 + t.local[i];
  *reinterpret_cast<uint64_t*>(out) = sum;
}}
"""


def generate(seed: int, numbers: range) -> Source:
    members = "; ".join(f"{type_} {name}" for name, type_ in VARIABLES.items()) + "; uint64_t local[8]"
    kernels = [_Writer(seed, number).kernel() for number in numbers]
    text = (
        f'#include "fuzz_prelude.h"\n\nstruct Thread {{ {members}; uint32_t index; }};\n'
        + _helpers()
        + "\n".join(kernels)
    )
    return Source(text, [f"kernel_{number}" for number in numbers])
