"""Bugs planted in copies of the sources, each with the tests that have to catch it.

A bug is a list of textual patches, so that csrc/ stays free of switches. Anchors are short, and
every occurrence is replaced: a change of the kernel should rarely touch them, and where it does,
tests/cpu/project/test_planted.py says which anchor is gone.

`caught_by` holds arguments of pytest: one of these selections has to fail, or to hang until the
watchdog ends it. BUILD means that the check of ptxas' report refuses the library.
"""

from .attention import OF_ATTENTION
from .bug import BUILD, INSTANTIATIONS, Bug
from .changes import DELAY, EVERY_LANE
from .experts import OF_EXPERTS
from .kernel import OF_KERNEL
from .producers import OF_PRODUCERS

BUGS = (*OF_KERNEL, *OF_PRODUCERS, *OF_EXPERTS, *OF_ATTENTION)

__all__ = ["BUGS", "BUILD", "DELAY", "EVERY_LANE", "INSTANTIATIONS", "Bug"]
