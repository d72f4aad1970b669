"""Everything that can be measured, by the name that ``--against`` takes."""

from __future__ import annotations

from .base import Peer, Unsupported
from .gemlite import GemLite
from .humming import Humming, HummingChannel, HummingGroup128
from .liquid import Liquid, Liquid6, Liquid32, LiquidInt8
from .native import Bf16, Fp8, Int8
from .vllm import Vllm

OURS = Liquid.name

PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        Liquid,
        Bf16,
        Fp8,
        Int8,
        Humming,
        HummingGroup128,
        HummingChannel,
        GemLite,
        Vllm,
        LiquidInt8,
        Liquid6,
        Liquid32,
    )
}

__all__ = ["OURS", "PEERS", "Peer", "Unsupported", "parse_peers"]


def parse_peers(text: str) -> list[str]:
    """Names of a comma-separated list of peers, each once; liquidgemm is not one of them.

    Raises:
        ValueError: an unknown name.
    """
    names = list(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    known = [name for name in PEERS if name != OURS]
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is none of {', '.join(known)}")
    return names
