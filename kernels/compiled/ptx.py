"""Reads PTX text: a `Program` is the parameters, registers, labels and instructions of one kernel.

PTX ISA 8.7, chapters 4 (syntax) and 5 (state spaces, types and variables). Names in an inner block { ... } hide those
outside; here they get the number of their block: `done` becomes `done@2`.
"""

import re
from typing import NamedTuple

WIDTHS = {"pred": 1, "b8": 8, "s8": 8, "u8": 8, "b16": 16, "s16": 16, "u16": 16, "f16": 16, "b32": 32, "s32": 32,
          "u32": 32, "f32": 32, "b64": 64, "s64": 64, "u64": 64, "f64": 64}  # fmt: skip


class Immediate(NamedTuple):
    """A constant of the text. Floating-point ones, 0fXXXXXXXX, are kept as their bits."""

    bits: int


class Symbol(NamedTuple):
    """The address of a variable, `global_smem`, or the name of a parameter or label."""

    name: str


class Address(NamedTuple):
    """[base + offset]; base is a register (str), an `Immediate` or a `Symbol`."""

    base: object
    offset: int


class Guard(NamedTuple):
    """@register or @!register: the instruction is for threads where it is true, or false."""

    register: str
    negated: bool


class Instruction(NamedTuple):
    opcode: str  # with modifiers: ld.global.v4.b32
    operands: tuple  # of str (register), Immediate, Symbol, Address, or a tuple of those for { ... }
    guard: Guard | None
    source: str  # where in the kernel's source: "tiles.py:89:23 @[ attention_forward.py:90:65 ]"
    text: str

    def __str__(self):
        return f"{self.text}  ({self.source})"


class Program(NamedTuple):
    name: str
    parameters: tuple  # of (name, type)
    registers: dict  # {name: bits}; %r<9> is kept as "%r": bits
    instructions: tuple
    labels: dict  # {name: index of the instruction that follows}
    threads: int

    def bits(self, register):
        """How wide a register is; 1 for a predicate."""
        if register in self.registers:
            return self.registers[register]
        return self.registers[register.rstrip("0123456789")]


def parse(text):
    """The `Program` of PTX text with one kernel. Raises ValueError for text that it cannot read."""
    name, parameters, threads, body = _entry(text)
    registers, labels, instructions = {}, {}, []
    blocks, opened, source = [], 0, ""
    declared = {}  # {block: names}

    def scoped(found):
        for block in reversed(blocks):
            if found in declared[block]:
                return f"{found}@{block}"
        return found

    statements = list(_statements(body))
    for position, (kind, value) in enumerate(statements):
        if kind == "source":
            source = value
        elif kind == "open":
            opened += 1
            blocks.append(opened)
            declared[opened] = _declared(statements, position)
        elif kind == "close":
            blocks.pop()
        elif kind == "label":
            labels[scoped(value)] = len(instructions)
        elif value.startswith(".reg"):
            _, type_, names = value.split(None, 2)
            for register in names.split(","):
                for one in _numbered(register) if blocks else [register.strip().split("<")[0]]:
                    registers[scoped(one)] = WIDTHS[type_[1:]]
        elif not value.startswith("."):
            instructions.append(_instruction(value, source, scoped))
    return Program(name, parameters, registers, tuple(instructions), labels, threads)


def _entry(text):
    """(name, parameters, threads, body without its outer braces) of the only kernel in the text."""
    kernels = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", text, re.DOTALL))
    if len(kernels) != 1:
        raise ValueError(f"the PTX has {len(kernels)} kernels, expected one")
    name, listed, directives = kernels[0].groups()
    parameters = tuple((found[1], found[0]) for found in re.findall(r"\.param\s+\.(\w+)[^,]*?([\w$]+)\s*(?:,|$)",
                                                                     listed.strip()))  # fmt: skip
    threads = re.search(r"\.reqntid\s+(\d+)", directives)
    if threads is None:
        raise ValueError(f"{name} does not say how many threads it has (.reqntid)")
    depth, start = 1, kernels[0].end()
    for found in re.finditer(r"//[^\n]*|[{}]", text[start:]):
        depth += {"{": 1, "}": -1}.get(found.group(), 0)
        if depth == 0:
            return name, parameters, int(threads.group(1)), text[start : start + found.start()]
    raise ValueError(f"the body of {name} has no end")


def _statements(body):
    """("source", where), ("open", None), ("close", None), ("label", name) and ("statement", text), in order."""
    pending = ""
    for line in body.splitlines():
        code, _, comment = line.partition("//")
        if code.strip().startswith(".loc"):
            yield "source", comment.strip()
            continue
        pending += " " + code.strip()
        while pending := pending.strip():
            if pending[0] in "{}":
                yield ("open" if pending[0] == "{" else "close"), None
                pending = pending[1:]
            elif label := re.match(r"([\w$]+):(?!:)", pending):
                yield "label", label.group(1)
                pending = pending[label.end() :]
            elif ";" in pending:
                statement, _, pending = pending.partition(";")
                yield "statement", statement.strip()
            else:
                break


def _declared(statements, position):
    """The names that the block opened at `position` declares itself: its labels and registers."""
    names, depth = set(), 0
    for kind, value in statements[position:]:
        depth += {"open": 1, "close": -1}.get(kind, 0)
        if depth == 0:
            return names
        if depth == 1 and kind == "label":
            names.add(value)
        if depth == 1 and kind == "statement" and value.startswith(".reg"):
            names.update(one for name in value.split(None, 2)[2].split(",") for one in _numbered(name))
    raise ValueError("a block { of the PTX has no end")


def _numbered(name):
    """The registers of one declaration: s<3> declares s0, s1, s2."""
    name, _, count = name.strip().partition("<")
    return [f"{name}{i}" for i in range(int(count.rstrip(">")))] if count else [name]


def _instruction(text, source, scoped):
    found = re.match(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.DOTALL)
    if found is None:
        raise ValueError(f"cannot read {text!r}")
    negated, guard, opcode, rest = found.groups()
    operands = tuple(_operand(one, scoped) for one in _split(rest))
    return Instruction(opcode, operands, guard and Guard(scoped(guard), bool(negated)), source, text)


def _split(text):
    """The operands: split at commas outside of braces, and `a|b` into two."""
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,|\s]+", text)
    return [part for part in parts if part]


def _operand(text, scoped):
    text = text.strip()
    if text[0] == "{":
        return tuple(_operand(one, scoped) for one in text[1:-1].split(","))
    if text[0] == "[":
        base, _, offset = text[1:-1].partition("+")
        return Address(_operand(base, scoped), int(offset or "0", 0))
    if text[0] == "%" or text == "_":
        return text
    if re.match(r"0[fF][0-9a-fA-F]{8}$|0[dD][0-9a-fA-F]{16}$", text):
        return Immediate(int(text[2:], 16))
    if re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
        return Immediate(int(text.rstrip("U"), 0))
    name = scoped(text)
    return name if "@" in name else Symbol(name)
