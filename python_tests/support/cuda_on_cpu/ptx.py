"""Translates PTX, as nvcc writes it for sm_90, to C++ over the fibers of cuda_runtime.h and the instructions of ptx.h.

A kernel becomes a function with gotos. What is not known here raises ``UnknownPTX`` with its text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

#: Instructions without an effect beyond their result: the types of the operands, each the instruction's own (t), the
#: unsigned one of its width, which wraps around (w), u32 (i) or pred (p); and C++ of the result.
_EXPRESSIONS = {
    "mov": ("t", "{0}"),
    "add": ("ww", "{0} + {1}"),
    "add.rn": ("tt", "{0} + {1}"),
    "add.rz": ("tt", "ptx::add_rz({0}, {1})"),
    "sub": ("ww", "{0} - {1}"),
    "mul": ("tt", "{0} * {1}"),
    "mul.rn": ("tt", "{0} * {1}"),
    "mul.lo": ("ww", "{0} * {1}"),
    "mul.wide": ("tt", "ptx::mul_wide({0}, {1})"),
    "mad.lo": ("www", "{0} * {1} + {2}"),
    "fma.rn": ("ttt", "std::fma({0}, {1}, {2})"),
    "fma.rm": ("ttt", "ptx::fma_rm({0}, {1}, {2})"),
    "div": ("tt", "ptx::div({0}, {1})"),
    "div.rn": ("tt", "{0} / {1}"),
    "rem": ("tt", "ptx::rem({0}, {1})"),
    "rcp.rn": ("t", "1 / {0}"),
    "sqrt.rn": ("t", "std::sqrt({0})"),
    "rcp.approx.ftz": ("t", "ptx::rcp_approx_ftz({0})"),
    "ex2.approx": ("t", "std::exp2({0})"),
    "ex2.approx.ftz": ("t", "ptx::ex2_approx_ftz({0})"),
    "neg": ("w", "-{0}"),
    "abs": ("t", "std::fabs({0})"),
    "copysign": ("tt", "std::copysign({1}, {0})"),  # the sign of the first
    "min": ("tt", "ptx::min({0}, {1})"),
    "max": ("tt", "ptx::max({0}, {1})"),
    "and": ("tt", "{0} & {1}"),
    "or": ("tt", "{0} | {1}"),
    "xor": ("tt", "{0} ^ {1}"),
    "not": ("t", "ptx::not_({0})"),
    "shl": ("ti", "ptx::shl({0}, {1})"),
    "shr": ("ti", "ptx::shr({0}, {1})"),
    "bfi": ("ttii", "ptx::bfi({0}, {1}, {2}, {3})"),
    "popc": ("t", "__builtin_popcountll({0})"),
    "clz": ("t", "ptx::clz({0})"),
    "selp": ("ttp", "{2} ? {0} : {1}"),
}
#: The type of a result that is not the instruction's.
_RESULTS = {("mul.wide", "s32"): "s64", ("mul.wide", "u32"): "u64", ("popc", "b64"): "b32", ("clz", "b64"): "b32"}
#: Those that end in u hold where there is a NaN, too.
_COMPARISONS = {
    "eq": "{0} == {1}",
    "ne": "!({0} == {1} || ptx::nan({0}, {1}))",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "equ": "{0} == {1} || ptx::nan({0}, {1})",
    "neu": "!({0} == {1})",
    "ltu": "!({0} >= {1})",
    "leu": "!({0} > {1})",
    "gtu": "!({0} <= {1})",
    "geu": "!({0} < {1})",
    "num": "!ptx::nan({0}, {1})",
    "nan": "ptx::nan({0}, {1})",
}
_CONVERSIONS = [
    (r"cvt\.([su]\d+)\.([su]\d+)", "cvt"),
    (r"cvt\.(f64)\.(f32)", "cvt"),
    (r"cvt\.(f32)\.(f16)", "cvt"),
    (r"cvt\.rn\.(f32)\.(f64)", "cvt"),
    (r"cvt\.rn\.(f32|f64)\.([su]\d+)", "cvt"),
    (r"cvt\.rni\.(f32|f64)\.\1", "cvt_rni"),
    (r"cvt\.sat\.(f32|f64)\.\1", "cvt_sat"),
]
_SPECIAL = {"%tid.x": "threadIdx.x", "%ctaid.x": "blockIdx.x", "%ntid.x": "blockDim.x", "%nctaid.x": "gridDim.x"}
_STATEMENTS = {
    "ret": "return",
    "bar.sync": 'leave(State::at_block, "bar.sync", {line})',
    "barrier.cluster.arrive": "++current().arrivals",
    "barrier.cluster.arrive.relaxed": "++current().arrivals",
    "barrier.cluster.wait": 'wait_for_cluster("barrier.cluster.wait", {line})',
    "membar.gl": "(void)0",
    "griddepcontrol.launch_dependents": "(void)0",
    "griddepcontrol.wait": "wait_for_launch({line})",
}
_TYPE = r"(?:pred|[busf](?:8|16|32|64))"
_ENTRY = re.compile(
    r"(?:\.visible\s+)?\.entry\s+([\w$]+)\s*\(([^)]*)\)\s*(?:\.maxntid\s+(\d+)[\s,1]*)?(?:\.\w+ [\d, ]+\s*)*\{"
)
_DYNAMIC = re.compile(r"^\.extern \.shared \.align (?:1|2|4|8|16) \.b8 ([\w$]+)\[\];$", re.MULTILINE)
_PARAMETER = re.compile(rf"\.param\s+(?:\.align \d+\s+)?\.({_TYPE})\s+([\w$]+)(?:\[(\d+)\])?")


class UnknownPTX(ValueError):
    """PTX that the translator does not know."""


@dataclass
class Kernel:
    name: str
    sizes: list[int]  # of its parameters
    most_threads: int
    shared_bytes: int = 0
    symbols: dict[str, str] = field(default_factory=dict)  # C++ of the address of each variable and parameter
    registers: dict[str, str] = field(default_factory=dict)  # the type of each
    body: list[str] = field(default_factory=list)

    @property
    def dynamic(self) -> int:
        """Where shared memory begins whose size the launch says: after the kernel's own."""
        return -(-self.shared_bytes // 16) * 16

    def cpp(self) -> str:
        """The function, and the object that makes it known to the launcher."""
        function = f"kernel_{self.name}"
        sizes = ", ".join(map(str, self.sizes))
        entry = f"{{{function}, {{{sizes}}}, {self.dynamic}, {self.most_threads}u}}"
        lines = [f"static void {function}(const u64* parameters) {{", f"constexpr u64 dynamic = {self.dynamic};"]
        lines += [*self.body, "}"]
        lines.append(f'static const auto known_{self.name} = by_name.emplace("{self.name}", Translated{entry});')
        return "\n".join(lines)


def translate(ptx: str) -> list[Kernel]:
    """The kernels of a PTX file, named as g++ names them."""
    text = re.sub(r"//[^\n]*", "", ptx)
    kernels, at = [], 0
    dynamic = _DYNAMIC.findall(text)
    text = _DYNAMIC.sub("", text)
    while match := re.compile(r"\s*(?:\.(?:version|target|address_size)[^\n]*\n|(?=\S))").match(text, at):
        at = match.end()
        if not match.group().strip():
            entry = _ENTRY.match(text, at)
            if not entry:
                raise UnknownPTX(text[at:].split("\n", 1)[0])
            kernel, at = _kernel(text, entry, dynamic)
            kernels.append(kernel)
    return kernels


def library(kernels: list[Kernel]) -> str:
    return "\n\n".join(
        [
            '#include "ptx.h"\n\nnamespace cuda_on_cpu::ptx {',
            *(kernel.cpp() for kernel in kernels),
            "}  // namespace cuda_on_cpu::ptx\n",
        ]
    )


def _kernel(text: str, entry: re.Match[str], dynamic: list[str]) -> tuple[Kernel, int]:
    # nvcc's name of an anonymous namespace holds a hash; g++'s does not.
    name = re.sub(r"(\d+)(_GLOBAL__N__.*)", lambda m: "12_GLOBAL__N_1" + m[2][int(m[1]) :], entry[1])
    parameters = [_PARAMETER.fullmatch(line.strip()) for line in entry[2].split(",") if line.strip()]
    if not all(parameters):
        raise UnknownPTX(entry[2].strip())
    found = [parameter for parameter in parameters if parameter]
    sizes = [_bytes(parameter[1]) * int(parameter[3] or 1) for parameter in found]
    kernel = Kernel(name, sizes, int(entry[3] or 1024))
    kernel.symbols = {parameter[2]: f"parameters[{i}]" for i, parameter in enumerate(found)}
    kernel.symbols |= dict.fromkeys(dynamic, "dynamic")  # all begin at one place
    at, line = entry.end(), text.count("\n", 0, entry.end()) + 1
    for statement, end in _statements(text, at):
        line += text.count("\n", at, end)
        at = end
        kernel.body += _statement(kernel, statement, line)
    return kernel, at


def _statements(text: str, at: int) -> Iterator[tuple[str, int]]:
    """Braces, labels, and the rest up to its semicolon; ends with the kernel's last brace."""
    part, depth = re.compile(r"\s*([{}]|[\w$]+:|[^;{}\s][^;]*;)"), 1
    while depth:
        match = part.match(text, at)
        if not match:
            raise UnknownPTX(text[at : at + 80].strip())
        at = match.end()
        depth += {"{": 1, "}": -1}.get(match[1], 0)
        if depth:
            yield match[1], at
    yield ";", at


def _bytes(type_: str) -> int:
    return int(type_[1:]) // 8 if type_ != "pred" else 1


def _wrapping(type_: str) -> str:
    """The unsigned type of an integer's width."""
    return f"u{type_[1:]}" if type_[0] in "bsu" else type_


def _converted(value: str, from_: str, to: str) -> str:
    """C++ of the same bits as another type, or of the lowest of them."""
    return value if from_.replace("b", "u") == to.replace("b", "u") else f"as<{to}>({value})"


def _statement(kernel: Kernel, statement: str, line: int) -> list[str]:
    if statement in "{};":
        return [statement]
    if statement.endswith(":"):
        return [f"{_label(statement[:-1])}:;"]
    statement = " ".join(statement[:-1].split())
    if statement.startswith("."):
        return _directive(kernel, statement)
    guard = re.match(r"@(!?)(%\w+) (.*)", statement)
    try:
        cpp = _Instruction(kernel, guard[3] if guard else statement, line).cpp()
    except UnknownPTX:
        raise
    except (KeyError, ValueError, IndexError, TypeError):
        raise UnknownPTX(f"line {line}: {statement}") from None
    condition = f"if ({guard[1]}{_register(guard[2])}) " if guard else ""
    return [f"{condition}{{ {cpp}; }}" if "; " in cpp else f"{condition}{cpp};"]


def _directive(kernel: Kernel, statement: str) -> list[str]:
    if match := re.fullmatch(r"\.pragma \"(nounroll|used_bytes_mask \w+)\"", statement):
        return []  # hints
    if match := re.fullmatch(r"\.reg \.(pred|[bsuf](?:16|32|64)) ((?:%\w+(?:<\d+>)?(?:, ?)?)+)", statement):
        kind, names = _wrapping(match[1]), []
        for name, count in re.findall(r"(%\w+)(?:<(\d+)>)?", match[2]):
            names += [f"{name}{i}" for i in range(int(count))] if count else [name]
        kernel.registers.update(dict.fromkeys(names, kind))
        return [f"{kind} {', '.join(map(_register, names))};"]
    if match := re.fullmatch(r"\.shared \.align (\d+) \.[bu]8 ([\w$]+)(?:\[(\d+)\])?", statement):
        align, size = int(match[1]), int(match[3] or 1)
        begin = -(-kernel.shared_bytes // align) * align
        kernel.symbols[match[2]] = f"u64({begin})"
        kernel.shared_bytes = begin + size
        return []
    raise UnknownPTX(statement)


def _label(name: str) -> str:
    return "at_" + name.replace("$", "")


def _register(name: str) -> str:
    if not re.fullmatch(r"%[a-zA-Z]+\d*", name):
        raise UnknownPTX(name)
    return name[1:] + "_"


class _Instruction:
    def __init__(self, kernel: Kernel, text: str, line: int) -> None:
        self.kernel, self.text, self.line = kernel, text, line
        self.opcode, _, operands = text.partition(" ")
        # Commas, but for those within braces.
        self.operands = [part.strip() for part in re.split(r",(?![^{]*\})", operands) if part.strip()]
        self.where = f'"{self.opcode}", {line}'

    def cpp(self) -> str:
        if self.opcode in _STATEMENTS:
            if self.operands != (["0"] if self.opcode == "bar.sync" else []):
                raise self.unknown()
            return _STATEMENTS[self.opcode].format(line=self.line)
        if self.opcode in ("bra", "bra.uni"):
            return f"goto {_label(self.operands[0])}"
        name, _, type_ = self.opcode.rpartition(".")
        if self.opcode.startswith("cvt."):
            return self.conversion()
        if name in _EXPRESSIONS and re.fullmatch(_TYPE, type_):
            return self.expression(name, type_)
        for pattern, make in _OTHERS.items():
            if match := re.fullmatch(pattern, self.opcode):
                return make(self, *match.groups())
        raise self.unknown()

    def unknown(self) -> UnknownPTX:
        return UnknownPTX(f"line {self.line}: {self.text}")

    def value(self, operand: str, type_: str) -> str:
        """C++ of an operand as a value of that type."""
        if operand in self.kernel.registers:
            return _converted(_register(operand), self.kernel.registers[operand], type_)
        if operand in _SPECIAL:
            return f"as<{type_}>({_SPECIAL[operand]})"
        if match := re.fullmatch(r"0(?:f([0-9A-F]{8})|d([0-9A-F]{16}))", operand):
            bits = "u32" if match[1] else "u64"
            return _converted(f"{bits}(0x{match[1] or match[2]}u)", bits, type_)
        if re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", operand) and type_[0] != "f":
            return f"static_cast<{type_}>(0x{int(operand, 0) & (1 << 64) - 1:x}ull)"
        return _converted(self.kernel.symbols[operand], "b64", type_)

    def assign(self, target: str, value: str, type_: str) -> str:
        register = self.kernel.registers[target]
        if _bytes(register) < _bytes(type_):
            raise self.unknown()
        if (register[0] == "f") == (type_[0] == "f"):
            return f"{_register(target)} = {value}"  # shorter integers are extended as their type is
        return f"{_register(target)} = as<{register}>(static_cast<{type_}>({value}))"

    def expression(self, name: str, type_: str) -> str:
        if name == "mov" and any("{" in operand for operand in self.operands):
            return self.split_or_join(type_)
        kinds, result = _EXPRESSIONS[name]
        types = [{"t": type_, "w": _wrapping(type_), "i": "u32", "p": "pred"}[kind] for kind in kinds]
        target, *operands = self.operands
        values = [self.value(operand, type_) for operand, type_ in zip(operands, types, strict=True)]
        return self.assign(target, result.format(*values), _RESULTS.get((name, type_), type_))

    def split_or_join(self, type_: str) -> str:
        """``mov`` between a register and two of half its width, the low one first."""
        target, source = self.operands
        half = f"b{_bytes(type_) * 4}"
        if source[0] == "{":
            low, high = (self.value(part, half) for part in self.elements(source, "2"))
            return self.assign(target, f"{low} | static_cast<{type_}>({high}) << {half[1:]}", type_)
        results = [f"static_cast<{half}>(whole)", f"static_cast<{half}>(whole >> {half[1:]})"]
        parts = zip(self.elements(target, "2"), results, strict=True)
        sets = [self.assign(part, result, half) for part, result in parts if part != "_"]
        return "; ".join([f"const {type_} whole = {self.value(source, type_)}", *sets])

    def conversion(self) -> str:
        if match := re.fullmatch(r"cvt\.rn\.(bf16|f16)x2\.f32", self.opcode):
            half = {"bf16": "raddpo::BFloat16", "f16": "raddpo::Float16"}[match[1]]
            target, high, low = self.operands
            return self.assign(target, f"ptx::pair<{half}>({self.value(high, 'f32')}, {self.value(low, 'f32')})", "b32")
        for pattern, function in _CONVERSIONS:
            if match := re.fullmatch(pattern, self.opcode):
                target, source = self.operands
                to, from_ = match[1], match[match.lastindex or 1]
                return self.assign(target, f"ptx::{function}<{to}>({self.value(source, from_)})", to)
        raise self.unknown()

    def comparison(self, name: str, type_: str) -> str:
        target, a, b = self.operands
        return self.assign(target, _COMPARISONS[name].format(self.value(a, type_), self.value(b, type_)), "pred")

    def pointer(self, operand: str, space: str | None, size: int) -> str:
        match = re.fullmatch(r"\[(%?[\w$]+)(?:\+(-?\d+))?\]", operand)
        if not match:
            raise self.unknown()
        base, offset = match[1], int(match[2] or 0)
        address = f"{self.value(base, _wrapping(self.kernel.registers.get(base, 'b64')))} + {offset}"
        place = "in_shared" if space == "shared" else "global"
        return f"{place}({address}, {size}, {self.where})"

    def load(self, space: str | None, vector: str | None, type_: str) -> str:
        target, address = self.operands
        registers = self.elements(target, vector)
        size = _bytes(type_)
        sets = [self.assign(r, f"load<{type_}>(from + {i * size})", type_) for i, r in enumerate(registers) if r != "_"]
        return "; ".join([f"const char* from = {self.pointer(address, space, size * len(registers))}", *sets])

    def store(self, space: str | None, vector: str | None, type_: str) -> str:
        address, source = self.operands
        registers = self.elements(source, vector)
        size = _bytes(type_)
        values = [self.value(register, type_) for register in registers]
        puts = [f"ptx::store<{type_}>(to + {i * size}, {value})" for i, value in enumerate(values)]
        return "; ".join([f"char* to = {self.pointer(address, space, size * len(registers))}", *puts])

    def elements(self, operand: str, vector: str | None) -> list[str]:
        if vector is None:
            return [operand]
        registers = [part.strip() for part in operand[1:-1].split(",")]
        if operand[0] != "{" or len(registers) != int(vector):
            raise self.unknown()
        return registers

    def atomic(self, space: str, name: str, type_: str) -> str:
        target, address, *operands = self.operands
        at = self.pointer(address, space, _bytes(type_))
        values = [self.value(operand, type_) for operand in operands]
        if len(values) != {"add": 1, "cas": 2}[name]:
            raise self.unknown()
        return self.assign(target, f"ptx::atom_{name}<{type_}>({', '.join([at, *values])})", type_)

    def shuffle(self, kind: str) -> str:
        target, value, by, limits, mask = self.operands
        target, _, inside = target.partition("|")
        values = ", ".join([self.value(value, "b32"), self.value(by, "u32"), self.value(limits, "u32")])
        steps = ["bool inside", f"expect_all_lanes({self.value(mask, 'u32')}, {self.where})"]
        steps.append(self.assign(target, f"ptx::shfl<Shuffle::{kind}>({values}, inside, {self.where})", "b32"))
        return "; ".join(steps + ([self.assign(inside, "inside", "pred")] if inside else []))

    def ballot(self) -> str:
        target, vote, mask = self.operands
        result = self.assign(target, f"__ballot_sync(~0u, {self.value(vote, 'pred')}, {self.where})", "b32")
        return f"expect_all_lanes({self.value(mask, 'u32')}, {self.where}); {result}"

    def same_address(self) -> str:
        target, address = self.operands
        return self.assign(target, self.value(address, "u64"), "u64")

    def shared_address(self) -> str:
        target, address = self.operands
        return self.assign(target, f"from_shared({self.value(address, 'u64')})", "u64")

    def mapped_address(self) -> str:
        target, address, rank = self.operands
        return self.assign(target, f"ptx::mapa({self.value(address, 'u64')}, {self.value(rank, 'u32')})", "u64")


_OTHERS = {
    rf"setp\.({'|'.join(_COMPARISONS)})\.({_TYPE})": _Instruction.comparison,
    rf"ld(?:\.(global|shared|param))?(?:\.nc)?(?:\.v([24]))?\.({_TYPE})": _Instruction.load,
    rf"st(?:\.(global|shared))?(?:\.wb)?(?:\.v([24]))?\.({_TYPE})": _Instruction.store,
    rf"atom(?:\.acq_rel\.gpu)?\.(global|shared)\.(add|cas)\.({_TYPE})": _Instruction.atomic,
    r"shfl\.sync\.(up|down|bfly|idx)\.b32": _Instruction.shuffle,
    r"vote\.sync\.ballot\.b32": _Instruction.ballot,
    r"cvta\.to\.global\.u64": _Instruction.same_address,
    r"cvta\.shared\.u64": _Instruction.shared_address,
    r"mapa\.u64": _Instruction.mapped_address,
}
