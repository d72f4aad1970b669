"""The comparison of two builds' machine code, on the text that cuobjdump prints."""

import pytest
import sass

SASS = """\
		Function : {name}
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;       /* 0x00000a00ff017b82 */
                                                                /* 0x000fe20000000800 */
        /*0010*/              @!P0 {opcode} R2, R3, {operand} ; /* 0x0000000000{word} */
                                                                /* 0x000e{control}00002500 */
        /*0020*/                   BRA 0x20 ;                   /* 0xfffffffc00fc7947 */
                                                                /* 0x000fc0000383ffff */
"""
USAGE = """\
 Function {name}:
  REG:{registers} STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def kernel(ignore: bool = False, **parts: str) -> sass.Kernel:
    values = {
        **dict(name="k", opcode="IADD3", operand="R4", word="027919", control="22"),
        **dict(registers="30"),
        **parts,
    }
    (parsed,) = sass.parse(SASS.format(**values), USAGE.format(**values), ignore)
    return parsed


def test_parts_of_a_kernel() -> None:
    parsed = kernel()
    assert parsed.name == "k"
    assert parsed.resources == "REG:30 STACK:0 SHARED:0 LOCAL:0"
    assert len(parsed.instructions) == 3
    assert parsed.instructions[2] == "BRA 0x20  0xfffffffc00fc7947 0x000fc0000383ffff"


def test_names_and_order_do_not_count() -> None:
    one, two = kernel(), kernel(opcode="IMAD")
    renamed = [kernel(name="b", opcode="IMAD"), kernel(name="a")]
    assert sass.compare([one, two], renamed) == []


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("opcode", "IMAD", "  + @!P0 IMAD R2, R3, R4"),
        ("word", "027918", "  + @!P0 IADD3 R2, R3, R4  0x0000000000027918"),
        ("control", "23", "0x000e2300002500"),
        ("registers", "31", "REG:30 STACK:0 SHARED:0 LOCAL:0 -> REG:31"),
    ],
)
def test_differences_are_told(part: str, value: str, said: str) -> None:
    (report,) = sass.compare([kernel()], [kernel(**{part: value})])
    assert report.startswith("k\n  became k\n")
    assert said in report


def test_a_copy_that_is_gone_or_new_is_told() -> None:
    one = kernel()
    assert sass.compare([one, one], [one]) == ["k is gone"]
    (report,) = sass.compare([one], [one, kernel(name="b")])
    assert report in ("k is new", "b is new")


def test_parameter_offsets_can_be_ignored() -> None:
    for ignore, differ in ((False, 1), (True, 0)):
        old = kernel(ignore, operand="c[0x0][0x210]", word="047919")
        new = kernel(ignore, operand="c[0x0][0x218]", word="067919")
        assert len(sass.compare([old], [new])) == differ
    old, new = kernel(True), kernel(True, opcode="IMAD")
    assert len(sass.compare([old], [new])) == 1
