"""Ways in which a run ends before its last step, each with the exit code of `unimm fit`."""

from __future__ import annotations

from typing import ClassVar


class RunStopped(RuntimeError):
    """The run ended early, on all its processes, after what it is worth was kept."""

    exit_code: ClassVar[int]


class Preempted(RunStopped):
    """The machine is wanted back: a checkpoint was written, the same command goes on from there.

    75 is EX_TEMPFAIL of sysexits.h: launchers start a run again that ends with it.
    """

    exit_code = 75


class NonFinite(RunStopped):
    """The loss stays NaN or infinite: starting again would only repeat it."""

    exit_code = 76
