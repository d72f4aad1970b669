"""For the processes that an engine starts: Python imports this if PYTHONPATH has the folder."""

import stand_ins  # noqa: F401
