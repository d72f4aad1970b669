"""Stands in for the processes of `bench serve`; without torch, so that they are there at once."""

import time

ABOUT = {"started_s": 1.0, "kv_tokens": 64, "methods": ["M"], "bytes_per_weight": 0.5}


def answer(connection, sizes, name, options):
    """Engines that measure, but for two: one that fails, and one that takes too long to start."""
    if name == "bf16":
        connection.send("OutOfMemoryError: no room")
        return
    if name == "humming":
        time.sleep(60)
    connection.send(ABOUT)
    while (asked := connection.recv()) is not None:
        if asked == "prompt":
            connection.send({"tokens": options.prompt, "first_token_s": 0.1})
        elif name == "fp8" and asked == 4:
            return
        else:
            found = {"step_ms": 1.0, "prefill_s": 2.0, "tokens_per_s": 3.0}
            connection.send({"batch": asked} | found)
