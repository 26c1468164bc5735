from __future__ import annotations

import pytest
from beit3_fast.bench.sass_hazards import Instruction, hazards


def sass(*lines, function="_gemm_kernel"):
    """Text as cuobjdump writes it; a line "loop:" names the next one's address, "BRA loop" goes there."""
    labels, code = {}, []
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = f"{0x10 * len(code):#x}"
        else:
            code.append(line)
    text = f'\tcode for sm_90a\n\t\tFunction : {function}\n\t.headerflags\t@"EF_CUDA_SM90"\n'
    for index, line in enumerate(code):
        guard, _, rest = line.rpartition("|")
        for label, address in labels.items():
            rest = rest.replace(label, address)
        text += f"        /*{0x10 * index:04x}*/    {guard:>8}  {rest} ;     /* 0x04e0000840187df0 */\n"
        text += "                                                           /* 0x000fe200078e00ff */\n"
    return text


def found(*lines):
    """(opcode of the writer, of the next iteration) of each hazard."""
    return [(hazard.writer.opcode, hazard.again) for hazard in hazards(sass(*lines))]


WGMMA = "HGMMA.64x64x16.F32.BF16 R24, R64, gdesc[UR8], R24, gsb0"
OPEN = WGMMA.removesuffix(", gsb0")
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def wait(groups):
    return f"WARPGROUP.DEPBAR.LE gsb0, {groups:#x}"


# ---- in a straight line ----------------------------------------------------------------------------------------------


def test_a_write_before_the_wait_is_a_hazard():
    assert found(WGMMA, "FMUL R64, R1, R2", WAIT, "EXIT") == [("FMUL", False)]
    (hazard,) = hazards(sass(WGMMA, "FMUL R64, R1.reuse, R2", WAIT, "EXIT"))
    assert str(hazard) == (
        "FMUL R64, R1.reuse, R2 at 0x10 writes to the A operand of "
        "HGMMA.64x64x16.F32.BF16 R24, R64, gdesc[UR8], R24, gsb0 at 0x0, unwaited"
    )


def test_a_write_after_the_wait_is_none():
    assert found("FMUL R64, R1, R2", WGMMA, WAIT, "FMUL R64, R1, R2", "EXIT") == []


@pytest.mark.parametrize("register", range(62, 70))
def test_a_takes_four_registers(register):
    assert bool(found(WGMMA, f"MOV R{register}, R1", WAIT)) == (64 <= register < 68)


@pytest.mark.parametrize(
    "harmless",
    [
        "FMUL R1, R64, R65",
        "STS.128 [R64], R64",
        "STG.E.128 desc[UR4][R64.64], R64",
        "ISETP.GE.AND P0, PT, R64, R65, PT",
        "@!PT LDS RZ, [RZ]",
        "R2UR UR64, R64",
        "LDGSTS.E.BYPASS.128 [R64], desc[UR16][R66.64], !P2",
        "BAR.SYNC.DEFER_BLOCKING R64, R65",
        "NANOSLEEP R64",
        "UMOV UR64, 0x2",
        "RED.E.ADD.F32 desc[UR4][R64.64], R65",
        "HGMMA.64x64x16.F32.BF16 R64, gdesc[UR8], R64",
        "IADD3 R1, P0, R64, R65, RZ",
    ],
)
def test_what_reads_is_no_hazard(harmless):
    assert found(WGMMA, harmless.replace("@!PT ", "@!PT|"), WAIT) == []


def test_a_in_shared_memory_is_safe():
    assert found("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", "MOV R8, R1", WAIT) == []


@pytest.mark.parametrize(
    ("writer", "registers"),
    [
        ("MOV R10, R1", 1),
        ("CS2R R10, SRZ", 2),
        ("CS2R.32 R10, SR_CLOCKLO", 1),
        ("LDSM.16.M88.4 R10, [R5+UR9+0x6000]", 4),
        ("LDSM.16.MT88.2 R10, [R5]", 2),
        ("LDSM.16.M88 R10, [R5]", 1),
        ("LDS.128 R10, [R5]", 4),
        ("LDG.E.64.CONSTANT R10, desc[UR4][R2.64]", 2),
        ("LDG.E.U16 R10, desc[UR4][R2.64]", 1),
        ("IMAD.WIDE.U32 R10, R1, R2, R4", 2),
        ("IADD3 R10, P0, R1, R2, RZ", 1),
        ("SHFL.BFLY PT, R10, R1, 0x1, 0x1f", 1),
        ("LOP3.LUT P0, R10, R1, 0xff, RZ, 0xc0, !PT", 1),
        ("HMMA.16816.F32.BF16 R10, R4, R6, R10", 4),
        ("F2F.F64.F32 R10, R1", 2),
        ("F2I.S64.TRUNC R10, R1", 2),
        ("SHF.R.U64 R10, R1, R2, R3", 1),
        ("ATOMG.E.ADD.F32.FTZ.RN.STRONG.GPU PT, R10, desc[UR4][R2.64], R5", 1),
    ],
)
def test_registers_that_an_instruction_writes(writer, registers):
    opcode, _, operands = writer.partition(" ")
    written = Instruction(0, "", opcode, tuple(operands.split(", "))).written()
    assert written == range(10, 10 + registers)
    for first in (7 - 1, 10 + registers):
        wgmma = WGMMA.replace("R64", f"R{first}")
        assert found(wgmma, writer, WAIT) == [], "the operand ends before it or begins after it"
    for first in (7, 10 + registers - 1):
        assert found(WGMMA.replace("R64", f"R{first}"), writer, WAIT) == [(opcode, False)]


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_a_wait_may_leave_the_youngest_groups_running():
    younger = WGMMA.replace("R64", "R72")
    assert found(WGMMA, younger, wait(1), "MOV R64, R1", WAIT) == []
    assert found(WGMMA, younger, wait(1), "MOV R72, R1", WAIT) == [("MOV", False)]
    assert found(WGMMA, younger, younger, wait(2), "MOV R64, R1", WAIT) == []
    assert found(WGMMA, younger, wait(2), "MOV R64, R1", WAIT) == [("MOV", False)]


def test_a_group_has_all_since_the_last():
    """The first is closed by the second: a wait for all but one leaves both running."""
    second = WGMMA.replace("R64", "R72")
    assert found(OPEN, second, wait(1), "MOV R64, R1", WAIT) == [("MOV", False)]
    assert found(OPEN, second, second, wait(1), "MOV R64, R1", WAIT) == []


def test_what_belongs_to_no_group_is_not_waited_for():
    assert found(OPEN, WAIT, "MOV R64, R1") == [("MOV", False)]


def test_a_wait_under_a_predicate_may_not_be_made():
    assert found(WGMMA, f"@P0|{WAIT}", "MOV R64, R1", WAIT) == [("MOV", False)]


# ---- loops and branches ----------------------------------------------------------------------------------------------


def test_through_the_back_edge_of_a_loop():
    """As triton-lang/triton#9433 has it: the next iteration loads while the last product is running."""
    body = ("LDSM.16.M88.4 R64, [R5]", "WARPGROUP.ARRIVE", WGMMA)
    assert found("loop:", *body, wait(1), "@P0|BRA loop", WAIT, "EXIT") == [("LDSM.16.M88.4", True)]
    assert found("loop:", *body, WAIT, "@P0|BRA loop", "EXIT") == []
    assert found("loop:", WAIT, *body, "@P0|BRA loop", WAIT, "EXIT") == [], "waited for at the loop's start"
    (hazard,) = hazards(sass("loop:", *body, wait(1), "@P0|BRA loop", WAIT, "EXIT"))
    assert str(hazard).startswith("LDSM.16.M88.4 R64, [R5] at 0x0 of the next iteration writes")


def test_an_older_product_is_waited_for_in_the_next_iteration():
    """Two groups an iteration: each wait leaves one running, whose registers are written after the next wait alone."""
    first, second = WGMMA, WGMMA.replace("R64", "R72")
    assert found("loop:", first, wait(1), "MOV R72, R1", second, wait(1), "MOV R64, R1", "@P0|BRA loop", WAIT) == []
    assert found("loop:", first, "MOV R72, R1", second, wait(1), "MOV R64, R1", "@P0|BRA loop", WAIT) == [("MOV", True)]


def test_an_iteration_that_leaves_out_the_wait():
    loop = ("loop:", WGMMA, "@P1|BRA past", WAIT, "past:", "MOV R64, R1", "@P0|BRA loop", "EXIT")
    assert found(*loop) == [("MOV", False)]
    assert found(*[line for line in loop if "past" not in line]) == []


def test_one_writer_on_two_paths_is_one_hazard():
    """The paths differ in the groups that were closed on them."""
    younger = WGMMA.replace("R64", "R72")
    assert found(WGMMA, "@P0|BRA past", younger, "past:", "MOV R64, R1", WAIT) == [("MOV", False)]


def test_paths_end_and_jumps_do_not_fall_through():
    assert found(WGMMA, "EXIT", "MOV R64, R1") == []
    assert found(WGMMA, "@P0|EXIT", "MOV R64, R1") == [("MOV", False)]
    assert found(WGMMA, "BRA end", "MOV R64, R1", "end:", WAIT) == []
    assert found(WGMMA, "BRA.U UP0, end", "MOV R64, R1", "end:", WAIT) == [("MOV", False)]
    assert found(WGMMA, "CALL.REL.NOINC sub", WAIT, "EXIT", "sub:", "MOV R64, R1", "RET.REL.NODEC R2 0x0") == [
        ("MOV", False)
    ]


@pytest.mark.parametrize("jump", ["BRX R4 -0x20", "BRA 0x7000", "CALL.ABS.NOINC `(other)"])
def test_a_jump_that_cannot_be_followed(jump):
    with pytest.raises(ValueError, match=jump.split()[0]):
        hazards(sass(WGMMA, jump, WAIT))
    assert hazards(sass(WGMMA, WAIT, jump)) == [], "it matters while a product runs"


def test_functions_are_apart():
    """Addresses begin anew, and nothing falls from one into the next."""
    text = sass(WGMMA, function="a") + sass("MOV R64, R1", "EXIT", function="b")
    assert hazards(text) == []
    assert len(hazards(sass("EXIT", function="a") + sass(WGMMA, "MOV R64, R1", function="b"))) == 1


def test_no_code():
    assert hazards("") == []
