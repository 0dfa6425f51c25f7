"""Run launch/reference.py again and again, and kill it each time at a random moment of its work.

    python tests/training/kill_reference.py KILLS SEED [RECIPE] [--section.key value ...]

A child is killed by SIGKILL before or after one of the next calls that read a stream or write a shard: in the middle of
a stream, of a file, between file and name. Print at which call each ended. It may not finish meanwhile.
"""

import os
import random
import signal
import sys
from pathlib import Path


def die_at(call: int) -> None:
    """Make this process kill itself before the `call`-th of certain calls."""
    import pyarrow.parquet

    from gpt2ft.data.plan import Plan
    from gpt2ft.training import reference_pass, reference_store

    reference_pass.SECONDS_BETWEEN_SHARDS = 0.0  # a shard for every stream
    num_calls = 0

    def count_calls(owner, name):
        original = getattr(owner, name)

        def replacement(*arguments, **options):
            nonlocal num_calls
            if owner is Plan or any(is_in_store(argument) for argument in arguments):
                num_calls += 1
                if num_calls == call:
                    print(f"killed at call {call}: {name}", flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(owner, name, replacement)

    count_calls(Plan, "stream")
    count_calls(pyarrow.parquet, "write_table")
    count_calls(os, "replace")
    count_calls(reference_store, "sync_folder")


def is_in_store(argument: object) -> bool:
    return isinstance(argument, str | Path) and "reference" in Path(argument).parts


if __name__ == "__main__":
    from gpt2ft.runs import compute_reference, main
    from gpt2ft.settings.parsing import parse_recipe
    from gpt2ft.settings.scripts import ReferenceSettings

    kills, seed = int(sys.argv[1]), int(sys.argv[2])
    settings = parse_recipe(ReferenceSettings, "quickstart-dpo", sys.argv[3:])
    moments = random.Random(seed)
    for _ in range(kills):
        call = moments.randint(12, 40)
        child = os.fork()
        if child == 0:
            die_at(call)
            main.run(compute_reference.run, settings)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(f"a child ended by itself, with {status}, before it could be killed at call {call}")
