"""Markdown from the record of a run."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.results import Case, Measurement, Run
from ..core.roofline import H100, Ceilings, Roofline, roofline
from ..peers import OURS


@dataclass(frozen=True)
class Column:
    """A peer's times that are compared with ours for the same op."""

    peer: str
    op: str  # ours that it is compared with
    title: str

    def of(self, case: Case) -> Measurement | None:
        return case.best(self.peer, self.op)


def comparisons(run: Run, cases: list[Case]) -> list[Column]:
    """One column per peer, and one more for a `linear` that is timed apart from its `gemm`."""
    columns = []
    for peer in run.peers:
        if peer == OURS:
            continue
        ops = {one.op for case in cases for one in case.measurements if one.peer == peer}
        if ops & {"gemm", "both"}:
            columns.append(Column(peer, "gemm", peer))
        if "linear" in ops:
            columns.append(Column(peer, "linear", f"{peer} linear"))
    return columns


def markdown(run: Run, ceilings: Ceilings = H100) -> str:
    """The whole report: what was measured on what, and one table per shape."""
    parts = [heading(run, ceilings)]
    for shape in run.shapes:
        cases = run.cases_of(shape["n"], shape["k"])
        if cases:
            parts.append(shape_section(run, shape, cases, ceilings))
    parts.extend(filter(None, (state_section(run), problems_section(run))))
    return "\n\n".join(parts) + "\n"


def heading(run: Run, ceilings: Ceilings) -> str:
    machine = run.machine
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    lines = [
        f"# liquidgemm on {machine['gpu']}",
        "",
        f"- GPU: {machine['gpu']}, {machine['sms']} SMs, L2 cache "
        f"{machine['l2_bytes'] / 2**20:.0f} MiB, driver {machine['driver'] or 'unknown'}",
        f"- Software: {packages}; CUDA {machine['cuda']}, Python {machine['python']}",
        f"- Commit {run.commit}, {run.started[:10]}: `{run.command}`",
        "- Times are medians in µs, weights not in the L2 cache. In brackets the peer's time over "
        "ours for the same op: above 1, ours is faster. Floor: a kernel that only copies the "
        "packed weight, launches hidden.",
        "- Predicted: µs to load the packed weight / to dequantize it / to multiply, each as if "
        "alone; the largest, in bold, is the roofline that the measured time is compared with. "
        f"Ceilings: {ceilings}; of {ceilings.source}.",
    ]
    if rest_ms := run.protocol.get("rest_ms"):
        lines.append(
            f"- Bursts: the GPU idles for {rest_ms:g} ms before each sample, so that its limit of "
            "power does not act."
        )
    if run.partial:
        lines.append(f"- **Partial**: {run.problem or 'the run is not over'}.")
    if run.floor_problem:
        lines.append(f"- Stream floor: {run.floor_problem}.")
    for name, peer in run.peers.items():
        if peer["absent"]:
            lines.append(f"- {name} is absent: {peer['absent']}.")
    return "\n".join(lines)


def shape_section(run: Run, shape: dict, cases: list[Case], ceilings: Ceilings) -> str:
    n, k = shape["n"], shape["k"]
    title = f"## N = {n}, K = {k}"
    if shape["labels"]:
        title += f" ({', '.join(shape['labels'])})"
    floor = run.floor(n, k)
    text = []
    if floor is not None:
        text = [
            f"Stream floor: {floor['pdl_us']:.2f} µs with launches hidden, "
            f"{floor['single_us']:.2f} µs with one launch after the other.",
            "",
        ]
    return "\n".join([title, "", *text, *shape_table(run, cases, floor, ceilings)])


def shape_table(run: Run, cases: list[Case], floor: dict | None, ceilings: Ceilings) -> list[str]:
    columns = comparisons(run, cases)
    header = ["M", "gemm", "p10-p90", "linear", "gemm / floor", "predicted", "% of roofline"]
    header += [column.title for column in columns]
    lines = ["| " + " | ".join(header) + " |", "|" + "---:|" * len(header)]
    for case in cases:
        cells = [str(case.m), *our_cells(case, floor, ceilings)]
        cells += [peer_cell(case, column) for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def our_cells(case: Case, floor: dict | None, ceilings: Ceilings) -> list[str]:
    gemm, linear = case.best(OURS, "gemm"), case.best(OURS, "linear")
    roof = roofline(case.m, case.n, case.k, ceilings)
    floor_us = floor["pdl_us"] if floor and roof.binds == "memory" else None
    return [
        number(gemm and gemm.us),
        f"{gemm.time.p10_us:.2f}-{gemm.time.p90_us:.2f}" if gemm else MISSING,
        number(linear and linear.us),
        f"{gemm.us / floor_us:.2f}" if gemm and floor_us else MISSING,
        predicted(roof),
        f"{100 * roof.us / gemm.us:.0f} ({roof.binds})" if gemm else MISSING,
    ]


def predicted(roof: Roofline) -> str:
    """The terms of the cost model, the one that binds in bold."""
    terms = {
        "memory": roof.memory_us,
        "dequantization": roof.dequantization_us,
        "mma": roof.mma_us,
    }
    texts = {name: number(us or None) for name, us in terms.items()}
    texts[roof.binds] = f"**{texts[roof.binds]}**"
    return " / ".join(texts.values())


MISSING = "-"


def number(us: float | None) -> str:
    """Three significant digits or two decimals, whichever is more."""
    if us is None:
        return MISSING
    return f"{us:.2f}" if us < 100 else f"{us:.1f}"


def peer_cell(case: Case, column: Column) -> str:
    theirs, ours = column.of(case), case.best(OURS, column.op)
    if theirs is None:
        return MISSING
    speedup = f" ({theirs.us / ours.us:.2f}x)" if ours else ""
    return number(theirs.us) + speedup


def state_section(run: Run) -> str:
    """Clocks, power and temperature, as nvidia-smi told them."""
    if not run.snapshots:
        return ""
    header = ["when", "SM MHz", "memory MHz", "power W", "limit W", "°C", "slowed by"]
    lines = ["## State of the GPU", "", "| " + " | ".join(header) + " |", "|---|" + "---:|" * 6]
    for one in run.snapshots:
        if "error" in one:
            lines.append(f"| {one['when']} | {one['error']} |" + " |" * 5)
            continue
        keys = ("sm_mhz", "memory_mhz", "power_w", "power_limit_w", "temperature_c")
        cells = [MISSING if one[key] is None else f"{one[key]:.0f}" for key in keys]
        slowed = one["slowed_by"]
        cells.append("unknown" if slowed is None else ", ".join(slowed) or "nothing")
        lines.append(f"| {one['when']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def problems_section(run: Run) -> str:
    """Everything that was asked for and has no time, each reason once."""
    where: dict[str, list[str]] = {}
    for case in run.cases:
        for one in case.measurements:
            if one.status != "ok":
                name = " ".join(filter(None, (one.peer, one.op, one.variant)))
                where.setdefault(f"{name}, {one.status}: {one.reason}", []).append(
                    f"{case.n}x{case.k} M={case.m}"
                )
    if not where:
        return ""
    lines = ["## Not measured", ""]
    for what, cases in where.items():
        shown = ", ".join(cases[:4]) + (f" and {len(cases) - 4} more" if len(cases) > 4 else "")
        lines.append(f"- {what} ({shown})")
    return "\n".join(lines)
