"""The command ``liquidgemm``."""

from .main import app

__all__ = ["app"]
