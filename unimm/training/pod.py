"""`python -m unimm.training.pod TORCHRUN-OPTIONS -- fit -c RECIPE.yaml ...`: torchrun for `unimm`.

torchrun ends with 1 whatever its processes ended with, and with a traceback when it is signalled
itself (measured on torch 2.11). Schedulers start a run again by its exit code, so here 75
(preempted) and 76 (loss not finite) come through.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from unimm.training.stops import NonFinite, Preempted


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `unimm` in every process of this node; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--" not in given:
        print("unimm: error: put -- between torchrun's options and unimm's", file=sys.stderr)
        return 2
    at = given.index("--")
    try:
        torchrun([*given[:at], "-m", "unimm.cli", *given[at + 1 :]])
    except ChildFailedError as error:
        return exit_code({failure.exitcode for failure in error.failures.values()})
    except SignalException:
        return Preempted.exit_code
    return 0


def exit_code(codes: set[int]) -> int:
    """The code of a node whose processes ended with these; the rest is killed by torchrun."""
    return next((c for c in (NonFinite.exit_code, Preempted.exit_code) if c in codes), 1)


if __name__ == "__main__":
    sys.exit(main())
