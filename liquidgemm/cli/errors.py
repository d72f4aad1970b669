"""What the command says when something goes wrong: one line on stderr, and an exit code.

1 for an error of input or run, 130 for an interrupt from the keyboard, 143 for SIGTERM, 129 if the
terminal is closed; typer ends with 2 for wrong usage. ``liquidgemm --debug`` prints the traceback
as well.
"""

from __future__ import annotations

import io
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NoReturn

import torch
import typer

MAX_LENGTH = 600  # transformers lists all architectures that it knows

# What an error of input or run raises; the name of any other class says more than its message.
_EXPLAINED = (OSError, ValueError, RuntimeError, TypeError, ImportError)


class Debug:
    """Whether tracebacks are shown, for this run of the command."""

    on = False


def fail(message: object, code: int = 1) -> NoReturn:
    """Ends the command with one line on stderr."""
    line = " ".join(str(message).split())
    if len(line) > MAX_LENGTH:
        line = line[:MAX_LENGTH] + " ..."
    typer.echo(f"liquidgemm: error: {line}", err=True)
    raise typer.Exit(code)


def print_whatever_comes() -> None:
    """A terminal or file that lacks a character gets an escape for it: no work is lost for that."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def readable(command: Callable[..., None]) -> Callable[..., None]:
    """The command with every error as one line."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with _terminated_like_interrupted():
                command(*args, **kwargs)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise  # typer ends quietly if nobody reads stdout any more
        except KeyboardInterrupt:
            _show_traceback()
            fail("interrupted", 130)
        except Exception as error:
            _show_traceback()
            fail(describe(error))

    return run


def describe(error: Exception) -> str:
    """An error in words, without its class where the message says enough."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        files = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([*files[:1], error.strerror])
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if out_of_memory or "can't allocate memory" in message:
        return f"out of memory{message and ': '}{message}"
    if isinstance(error, _EXPLAINED) and message:
        return message
    return f"{type(error).__name__}: {message} (liquidgemm --debug shows where)"


def _show_traceback() -> None:
    if Debug.on:
        traceback.print_exc()


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """What ends a process unwinds the stack in here, so that nothing half-written stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    # A closed terminal sends SIGHUP, which nohup has ignored.
    signals = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) == signal.SIG_DFL]
    for each in signals:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each in signals:
            signal.signal(each, signal.SIG_DFL)
