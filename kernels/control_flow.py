"""The loops of machine code, found the way compilers do: a loop is a branch back to an instruction that dominates it.

A branch backwards alone is no sign of one: code that waits for a barrier is laid out behind everything else, and jumps
back to where it came from.
"""

from typing import NamedTuple


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
