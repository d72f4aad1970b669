"""What a planted bug is, and the tests that catch them."""

from dataclasses import dataclass

KERNEL = "csrc/liquidgemm/kernel"
INSTANTIATIONS = "instantiations/liquidquant"  # below csrc
BUILD = "the build"
ALL_TILES = ()

EXACT = "tests/gpu/test_gemm.py -k every_plan"
EPILOGUE = "tests/gpu/test_gemm.py -k epilogue"
BACK_TO_BACK = "tests/gpu/test_gemm.py -k back_to_back"
OVERTAKING = "tests/gpu/test_overtaking.py"
CANARIES = "tests/gpu/test_canaries.py"
SMALL = "tests/gpu/test_small_suite.py"
QUANTIZING = "tests/gpu/test_quantizing_gemm.py"
GROUPED = "tests/gpu/test_grouped_gemm.py"
MOE = "tests/gpu/test_moe_chain.py"
GATES = "tests/gpu/test_gates.py"
BY_SLOTS = "tests/gpu/test_moe_by_slots.py"
PRODUCERS = "liquidgemm/producers"  # below csrc
FORMATS = "tests/gpu/test_weight_formats.py"
OF_GROUPED = ("instantiations/grouped/t16_p1_k4_s4.cu",)
OF_SLOTS = ("instantiations/slots/t8_p1_k4_s4.cu",)
FUSED = "tests/gpu/test_fused_producers.py"
ATTENTION = "liquidgemm/attention"  # below csrc
KV = "tests/gpu/test_kv.py"
NORM, GLU = (f"{PRODUCERS}/{name}.cu" for name in ("rms_norm", "glu"))


@dataclass(frozen=True)
class Patch:
    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Bug:
    name: str
    patches: tuple[Patch, ...]
    caught_by: tuple[str, ...]
    tool: str = ""  # of compute-sanitizer, which has to report it too
    units: tuple[str, ...] = (f"{INSTANTIATIONS}/t32_p1_k3_s2.cu",)  # what is compiled with the bug

    def apply(self, text: str, file: str) -> str:
        """The file's text with the patches that are meant for it.

        Raises:
            LookupError: an anchor is gone.
        """
        for patch in self.patches:
            if patch.file != file:
                continue
            if patch.old not in text:
                raise LookupError(f"{self.name}: {file} no longer holds {patch.old!r}")
            text = text.replace(patch.old, patch.new)
        return text

    @property
    def files(self) -> set[str]:
        return {patch.file for patch in self.patches}


def bug(name: str, file: str, old: str, new: str, *caught_by: str, **more) -> Bug:
    return Bug(name, (Patch(f"{KERNEL}/{file}", old, new),), caught_by, **more)


def producer_bug(name: str, unit: str, old: str, new: str, *caught_by: str, **more) -> Bug:
    return Bug(name, (Patch(f"csrc/{unit}", old, new),), caught_by, units=(unit,), **more)


def attention_bug(name: str, file: str, old: str, new: str, *caught_by: str, **more) -> Bug:
    """Of decode attention over int8."""
    patches = (Patch(f"csrc/{ATTENTION}/{file}", old, new),)
    return Bug(name, patches, caught_by, units=(f"{ATTENTION}/decode_int8.cu",), **more)
