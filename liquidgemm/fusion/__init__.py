"""`fuse_`: decoder layers of transformers with fused producers and merged projections."""

from .model import FusionReport, fuse_

__all__ = ["FusionReport", "fuse_"]
