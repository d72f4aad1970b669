"""`formats.liquidquant`, by its old name, for changes that are under way."""

from ..formats.liquidquant import *  # noqa: F403
