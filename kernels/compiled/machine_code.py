"""Reads disassembled kernels: registers, spills, load widths, and the instructions of the innermost loops.

Triton writes the source line of every instruction into its output. A loop with instructions of `tiles.visible` is an
edge; a loop without them is the interior. `Loop.lines` counts the instructions of each line of our source. Widths of
memory accesses are read from the assembler's input, which names the whole chain of calls, so that `q`, `k` and `lse`
can be distinguished. The assembler does not change the widths.
"""

import ast
import collections
import functools
import inspect
import linecache
import re
from pathlib import Path
from typing import NamedTuple

from ..backends.triton import tiles

KERNELS = Path(tiles.__file__).parent
# Arrays of one number a row, token or part: their loads are narrow because the rows are, and there are few of them
ROW_ARRAYS = {"lse", "lse_log2", "delta", "sink", "start", "past", "length", "position", "part_max", "part_sum", "max",
              "sum"}  # fmt: skip

# What executes an instruction, by the start of its name; the first match counts. Uniform instructions (one result for a
# whole warp) have a data path of their own. NVIDIA documents names, not pipes: this follows profilers' metrics.
CUDA_PIPES = (
    ("matrix", r"[HIQBDO]?G?MMA\b|QMMA|UTC\w*MMA"),
    ("mufu", r"MUFU|[FI]2[FI]$|F2I|I2F$|POPC|FLO"),
    ("fma", r"FFMA|FMUL|FADD|IMAD|HFMA2|HADD2|HMUL2|FSWZADD|IDP|DFMA|DMUL|DADD"),
    ("shared", r"LDS|STS|SHFL|ATOMS|LDTM|STTM|MOVM"),
    ("global", r"LDG(?!DEPBAR)|STG|LDL|STL|RED\b|ATOMG|UTMA|LDC|UBLKCP|CCTL"),
    ("control", r"BRA|BAR|BS|BREAK|EXIT|RET|CALL|NOP|DEPBAR|LDGDEPBAR|WARP|SYNCS|FENCE|MEMBAR|UTCBAR|ARRIVES|YIELD|"
     r"NANOSLEEP|ERRBAR|UTCATOM|ELECT|ACQ"),
    ("uniform", r"U[A-Z]|R2UR|S2UR|S2R|VOTE|REDUX|CREDUX|CS2R"),
    ("alu", r""),
)  # fmt: skip
AMD_PIPES = (
    ("matrix", r"v_mfma|v_smfmac"),
    ("mufu", r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
    ("shared", r"ds_"),
    ("global", r"buffer_|global_|flat_|scratch_|s_load|s_buffer"),
    ("control", r"s_(waitcnt|nop|barrier|c?branch|cbranch\w*|endpgm|setprio|sleep)"),
    ("uniform", r"s_"),
    ("fma", r"v_(pk_)?(fma|fmac|mul_f|add_f|sub_f|mad)"),
    ("alu", r"v_"),
)
PIPES = tuple(name for name, _ in CUDA_PIPES)


class Access(NamedTuple):
    """Global memory accesses of one kind and width."""

    what: str  # the variable of the source, "q" or "q: cos"; "" where the compiler lost it
    kind: str  # "load", "copy" (asynchronous, into shared memory) or "store"
    bytes: int  # a thread, each time
    count: int  # instructions in the kernel
    of_rows: bool  # one number a row, token or part: narrow by nature


class Loop(NamedTuple):
    """An innermost loop: instructions a thread issues in one turn."""

    masked: bool  # an edge
    instructions: int
    pipes: dict  # {pipe: instructions}
    opcodes: dict  # {instruction with its widths: count}, most frequent first
    lines: dict  # {source line: count}, likewise


class Found(NamedTuple):
    registers: int
    stack_bytes: int
    spilled_bytes: int
    static_shared_bytes: int
    instructions: int
    matrix: tuple
    accesses: tuple
    loops: tuple


class Instruction(NamedTuple):
    name: str  # with modifiers, such as LDG.E.128
    source: tuple  # (file name, line), of the innermost function


def read_cuda(sass, usage, ptx):
    """`Found` from nvdisasm -c -g, cuobjdump -res-usage and PTX."""
    registers, stack, static_shared = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage).groups())
    instructions, branches = _instructions_cuda(sass)
    stores = (re.match(r"STL(?:\.(\d+))?", one.name) for one in instructions)
    spilled = sum(int(store.group(1) or 32) // 8 for store in stores if store)
    return Found(
        registers, stack, spilled, static_shared, len(instructions),
        matrix=tuple(sorted({one.name.split(".")[0] for one in instructions if pipe_of(one.name) == "matrix"})),
        accesses=_accesses(ptx, _CUDA_ACCESS, "//"),
        loops=_loops(instructions, branches),
    )  # fmt: skip


def read_amd(asm):
    """`Found` from a dict with the "amdgcn" text."""
    text = asm["amdgcn"]

    def fact(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    instructions, branches = _instructions_amd(text)
    return Found(
        registers=fact("vgpr_count"),  # accumulation registers included
        stack_bytes=fact("private_segment_fixed_size"),
        spilled_bytes=4 * fact("vgpr_spill_count"),  # scalar registers spill into vector registers, not memory
        static_shared_bytes=0,  # Triton's own figure has it all
        instructions=len(instructions),
        matrix=tuple(sorted({one.name for one in instructions if pipe_of(one.name) == "matrix"})),
        accesses=_accesses(text, _AMD_ACCESS, ";"),
        loops=_loops(instructions, branches),
    )


@functools.cache
def pipe_of(name):
    """The pipe that executes an instruction of this name, of either vendor."""
    table = AMD_PIPES if name.islower() else CUDA_PIPES
    return next((pipe for pipe, pattern in table if re.match(pattern, name)), "alu")


def _instructions_cuda(sass):
    """([Instruction], [Branch])."""
    instructions, labels, jumps, source = [], {}, [], ("", 0)
    for line in sass.splitlines():
        if place := re.match(r'\s*//## File "([^"]+)", line (\d+)', line):
            source = (Path(place.group(1)).name, int(place.group(2)))
        elif label := re.match(r"\s*(\.L_[\w.]+):", line):
            labels[label.group(1)] = len(instructions)
        elif code := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([\w.]+)\s*(.*?);", line):
            predicate, name, operands = code.groups()
            if name in ("EXIT", "RET") or name.startswith("BRA"):
                target = re.search(r"\((\.L_[\w.]+)\)", operands)
                # a predicate may also be the first operand: BRA.U !UP0, `(.L_x_1)
                conditional = bool(predicate) or (target and not operands.startswith("`"))
                jumps.append((len(instructions), target and target.group(1), bool(conditional)))
            instructions.append(Instruction(name, source))
    return instructions, [Branch(at, labels.get(target), conditional) for at, target, conditional in jumps]


def _instructions_amd(text):
    instructions, labels, jumps, files, source = [], {}, [], {}, ("", 0)
    for line in text.splitlines():
        if file := re.match(r'\s*\.file\s+(\d+)\s+"[^"]*"\s+"([^"]+)"', line):
            files[file.group(1)] = file.group(2)
        elif place := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            source = (files.get(place.group(1), ""), int(place.group(2)))
        elif label := re.match(r"(\.L[\w$]+):", line):
            labels[label.group(1)] = len(instructions)
        elif code := re.match(r"\s+((?:v|s|ds|buffer|global|flat|scratch)_\w+)\s*(.*)", line):
            name, operands = code.groups()
            if "branch" in name or name == "s_endpgm":
                jumps.append((len(instructions), operands.split(" ")[0], "cbranch" in name))
            instructions.append(Instruction(name, source))
    return instructions, [Branch(at, labels.get(target), conditional) for at, target, conditional in jumps]


def _loops(instructions, branches):
    """The innermost loops that make matrix products; where there are none, the innermost loops of some length."""

    def multiplies(loop):
        return any(pipe_of(instructions[i].name) == "matrix" for i in loop)

    found = innermost_loops(len(instructions), branches, multiplies)
    # waiting for a barrier is a loop too, of a few instructions
    found = found or innermost_loops(len(instructions), branches, lambda loop: len(loop) > 16)
    return tuple(_loop([instructions[i] for i in loop]) for loop in found)


def _loop(instructions):
    first, length = _lines_of_visible()
    masked = any(name == "tiles.py" and first <= line < first + length for _, (name, line) in instructions)
    pipes = collections.Counter(pipe_of(one.name) for one in instructions)
    opcodes = collections.Counter(one.name for one in instructions)
    lines = collections.Counter(_source_line(*one.source) for one in instructions)
    return Loop(
        masked,
        len(instructions),
        {pipe: pipes[pipe] for pipe in PIPES if pipes[pipe]},
        dict(opcodes.most_common()),
        dict(lines.most_common()),
    )


@functools.cache
def _lines_of_visible():
    lines, first = inspect.getsourcelines(tiles.visible.fn)
    return first, len(lines)


def _source_line(name, line):
    """What a place in the source says: the line itself of ours, of Triton's library the function."""
    path = KERNELS / name
    if path.is_file():
        return linecache.getline(str(path), line).strip() or f"{name}:{line}"
    return _library_function(name, line) or "none"


@functools.cache
def _library_function(name, line):
    import triton.language

    path = Path(triton.language.__file__).parent / name
    if not name or not path.is_file():
        return None
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    inside = [node for node in functions if node.lineno <= line <= node.end_lineno]
    return f"tl.{max(inside, key=lambda node: node.lineno).name.strip('_')}" if inside else None


# kind, then pattern with the groups that give the bytes a thread moves
_CUDA_ACCESS = (
    ("copy", re.compile(r"\bcp\.async\.c[ag]\.shared\.global\b.*?\], *(?P<bytes>0x[0-9a-f]+|\d+)")),
    ("load", re.compile(r"\bld\.global\b\S*?(?:\.v(?P<vector>\d))?\.[bfsu](?P<bits>\d+)")),
    ("store", re.compile(r"\bst\.global\b\S*?(?:\.v(?P<vector>\d))?\.[bfsu](?P<bits>\d+)")),
)
_AMD_ACCESS = (
    ("load", re.compile(r"\b(?:buffer|global|flat)_load_(?P<width>\w+)")),
    ("store", re.compile(r"\b(?:buffer|global|flat)_store_(?P<width>\w+)")),
)
_AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}


def _accesses(text, patterns, comment):
    """The global accesses in PTX or AMD assembly, with the variable that the chain of source lines names."""
    counts, what = collections.Counter(), ""
    place = re.compile(rf"\s*\.loc\s.*?{comment}\s*(.*)")
    for line in text.splitlines():
        if found := place.match(line):
            what = _variable(found.group(1)) or what
        else:
            for kind, pattern in patterns:
                if access := pattern.search(line):
                    counts[what, kind, _width(access.groupdict())] += 1
    return tuple(Access(*key, count, key[0].split(": ")[-1] in ROW_ARRAYS) for key, count in counts.items())


def _width(groups):
    if "width" in groups:
        word = groups["width"].removeprefix("u").removeprefix("s")
        return _AMD_WIDTHS.get(word) or (1 if word.startswith("byte") else 2)
    if "bytes" in groups:
        return int(groups["bytes"], 0)
    return int(groups["vector"] or 1) * int(groups["bits"]) // 8


@functools.cache
def _variable(chain):
    """The names that the lines of a chain of calls, innermost first, give to what they load or store: "q: cos"."""
    names = []
    for name, line in reversed(re.findall(r"([\w.]+\.py):(\d+)", chain)):
        path = KERNELS / name
        text = linecache.getline(str(path), int(line)).strip() if path.is_file() else ""
        if loaded := re.match(r"(\w+) [-+*]?= .*load", text):
            names.append(loaded.group(1))
        elif stored := re.match(r"tl\.store\((\w+?)_(?:ptrs?|rows|slots)\b", text):
            names.append(stored.group(1))
    return ": ".join(dict.fromkeys(names))


# Loops are found the way compilers do: a loop is a branch back to an instruction that dominates it. A branch backwards
# alone is no sign of one: code that waits for a barrier is laid out behind everything else, and jumps back.


class Branch(NamedTuple):
    at: int  # instruction
    to: int | None  # instruction, or None for one that leaves the program
    conditional: bool


def innermost_loops(length, branches, counts=lambda loop: True):
    """The loops that contain no other, of those for which `counts` is true: [sorted instructions], in code order.

    length: the number of instructions; branches: [Branch], all others continue with the next instruction.
    """
    starts, successors = _blocks(length, branches)
    ends = [*starts[1:], length]
    bodies = [
        frozenset(i for block in blocks for i in range(starts[block], ends[block]))
        for blocks in _natural_loops(successors)
    ]
    bodies = [body for body in bodies if counts(sorted(body))]
    return sorted(sorted(body) for body in bodies if not any(other < body for other in bodies))


def _blocks(length, branches):
    """(first instruction of each basic block, [the blocks that may follow])."""
    by_place = {branch.at: branch for branch in branches}
    starts = {0} | {branch.to for branch in branches if branch.to is not None}
    starts = sorted(start for start in starts | {branch.at + 1 for branch in branches} if start < length)
    index = {start: block for block, start in enumerate(starts)}
    successors = []
    for block, end in enumerate([*starts[1:], length]):
        branch = by_place.get(end - 1)
        follows = [block + 1] if (branch is None or branch.conditional) and end < length else []
        if branch is not None and branch.to is not None:
            follows.append(index[branch.to])
        successors.append(follows)
    return starts, successors


def _natural_loops(successors):
    """The blocks of each loop; loops with one header are one."""
    predecessors = [[] for _ in successors]
    for block, follows in enumerate(successors):
        for after in follows:
            predecessors[after].append(block)
    dominators = _dominators(successors, predecessors)
    loops = {}
    for block, follows in enumerate(successors):
        for header in follows:
            if header in dominators[block]:
                body = loops.setdefault(header, {header})
                todo = [block]
                while todo:
                    inside = todo.pop()
                    if inside not in body:
                        body.add(inside)
                        todo += predecessors[inside]
    return list(loops.values())


def _dominators(successors, predecessors):
    """For each block the blocks on every path to it, itself included; empty for a block that nothing reaches."""
    order, seen, stack = [], {0}, [(0, iter(successors[0]))]
    while stack:  # depth first, so that a block's predecessors mostly come before it
        block, follows = stack[-1]
        after = next((one for one in follows if one not in seen), None)
        if after is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(after)
            stack.append((after, iter(successors[after])))
    order.reverse()
    dominators = [set() for _ in successors]
    dominators[0] = {0}
    for block in order[1:]:
        dominators[block] = set(seen)
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new = {block} | set.intersection(*(dominators[one] for one in predecessors[block] if one in seen))
            changed |= new != dominators[block]
            dominators[block] = new
    return dominators
