"""A look into sm_90 machine code for wgmma whose A registers are written too early.

A wgmma (HGMMA in SASS) runs on after the warps have issued it. Its A operand may lie in registers, and then it reads
them while it runs: until a wait says that it is done, PTX forbids to write them. Between the last product of a loop and
the first load of the next iteration a compiler may forget that (triton-lang/triton#9433). The results are right as long
as the tensor cores are quick enough, so no test of the results finds it; nor does a simulator that reads A at once.

How SASS says who waits for whom: ``gsb0`` on an HGMMA closes a group, of it and of all HGMMA since the group before;
``WARPGROUP.DEPBAR.LE gsb0, N`` waits until no more than the N youngest groups are running. From each HGMMA with A in
registers every path is followed, backwards jumps too, until such a wait covers it; what writes to A before is a hazard.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

A_REGISTERS = 4
"""Of a thread, whatever the dtype: a warp group's 64 rows of 32 bytes."""
MOST_GROUPS = 8
"""Groups that are told apart; no code waits for an older one."""

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.M)
_FUNCTION = re.compile(r"^\s*Function : ", re.M)
_WGMMA = re.compile(r"[HIQB]GMMA\b")
_PREDICATE = re.compile(r"!?U?P[\dTR]")
_NO_DESTINATION = re.compile(
    r"(?:\w*SETP2?|FCHK|ST|STG|STS|STL|RED|REDG|REDS|BAR|BRX|CALL|RET|JMX|NANOSLEEP|WARPSYNC|R2P|[HIQB]GMMA)\b"
)
"""Instructions whose first register, if there is one, is read. Of a wgmma the accumulators are written when the older
ones are through, since the tensor cores keep their order."""


@dataclass(frozen=True)
class Instruction:
    """A line of SASS; ``guard`` is the predicate under which it runs, "" for always."""

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.opcode} {', '.join(self.operands)} at {self.address:#x}"

    def written(self) -> range:
        """The registers that it writes."""
        if _NO_DESTINATION.match(self.opcode):
            return range(0)
        for operand in self.operands:
            if not _PREDICATE.fullmatch(operand):
                found = re.match(r"R(\d+)", operand)
                return range(int(found[1]), int(found[1]) + _width(self.opcode)) if found else range(0)
        return range(0)

    def a_registers(self) -> range:
        """Those from which a wgmma reads its A operand; none if that is in shared memory."""
        found = _WGMMA.match(self.opcode) and len(self.operands) > 1 and re.match(r"R(\d+)", self.operands[1])
        return range(int(found[1]), int(found[1]) + A_REGISTERS) if found else range(0)


def _width(opcode: str) -> int:
    """Registers of a thread that the result takes; where in doubt rather too many."""
    name, *parts = opcode.split(".")
    if name in ("HMMA", "IMMA", "DMMA"):
        return 4
    if name == "LDSM":
        return int(parts[-1]) if parts[-1] in ("2", "4") else 1
    if name == "CS2R":
        return 1 if "32" in parts else 2
    if name in ("DADD", "DMUL", "DFMA") or "WIDE" in parts:
        return 2
    if name in ("F2F", "I2F"):
        return 2 if parts[:1] == ["F64"] else 1
    if name == "F2I":
        return 2 if {"S64", "U64"} & set(parts) else 1
    return next((registers for size, registers in (("128", 4), ("64", 2)) if size in parts), 1)


@dataclass(frozen=True)
class Hazard:
    """``writer`` changes a register from which ``wgmma`` may still read; ``again`` if it stands before it in the code
    and comes after it in a loop."""

    wgmma: Instruction
    writer: Instruction
    again: bool

    def __str__(self) -> str:
        return f"{self.writer}{' of the next iteration' * self.again} writes to the A operand of {self.wgmma}, unwaited"


def hazards(assembly: str) -> list[Hazard]:
    """The hazards in the text of ``cuobjdump -sass``: for each wgmma with A in registers the first on each path.

    Raises:
        ValueError: a jump that cannot be followed, to an address from a register or outside of the function.
    """
    return [hazard for function in _functions(assembly) for hazard in _hazards(function)]


def _functions(assembly: str) -> Iterator[list[Instruction]]:
    for text in _FUNCTION.split(assembly):
        lines = _LINE.findall(text)
        if lines:
            yield [
                Instruction(
                    int(address, 16), guard, opcode, tuple(part.strip() for part in rest.split(",") if part.strip())
                )
                for address, guard, opcode, rest in lines
            ]


def _hazards(code: Sequence[Instruction]) -> Iterator[Hazard]:
    position = {instruction.address: index for index, instruction in enumerate(code)}
    for start, wgmma in enumerate(code):
        registers = set(wgmma.a_registers())
        if not registers:
            continue
        # the number of groups closed since the wgmma was issued, its own included
        states = [(following, int(_closes(wgmma))) for following in _successors(code, start, position)]
        seen, writers = set(states), set()
        while states:
            index, groups = states.pop()
            instruction = code[index]
            if instruction.opcode.startswith("WARPGROUP.DEPBAR") and groups > _still_running(instruction):
                continue
            if registers & set(instruction.written()):
                if index not in writers:
                    writers.add(index)
                    yield Hazard(wgmma, instruction, again=index <= start)
                continue
            groups = min(groups + _closes(instruction), MOST_GROUPS)
            new = {(following, groups) for following in _successors(code, index, position)} - seen
            seen |= new
            states += new


def _closes(instruction: Instruction) -> bool:
    return _WGMMA.match(instruction.opcode) is not None and "gsb0" in instruction.operands


def _still_running(wait: Instruction) -> int:
    """How many groups may be running after the wait; all of them if it may not be made."""
    return MOST_GROUPS if wait.guard else int(wait.operands[1], 16)


def _successors(code: Sequence[Instruction], index: int, position: dict[int, int]) -> list[int]:
    """Where execution may go on."""
    instruction = code[index]
    name = instruction.opcode.partition(".")[0]
    targets = [int(operand, 16) for operand in instruction.operands if re.fullmatch(r"0x[0-9a-f]+", operand)]
    found = []
    if name in ("BRA", "CALL", "JMP", "WARPSYNC") and targets:
        if targets[-1] not in position and name != "WARPSYNC":
            raise ValueError(f"{instruction} leads out of the function")
        found += [position[target] for target in targets[-1:] if target in position]
    elif name in ("BRA", "BRX", "CALL", "JMP", "JMX"):
        raise ValueError(f"{instruction}: where to is not known")
    ends = name in ("EXIT", "RET", "KILL") or (instruction.opcode in ("BRA", "JMP") and len(instruction.operands) == 1)
    if (instruction.guard or not ends) and index + 1 < len(code):
        found.append(index + 1)
    return found
