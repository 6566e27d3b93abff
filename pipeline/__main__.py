"""`python -m pipeline` and `ringnet`: pick what to run. A stage must not import what only the command needs."""
from __future__ import annotations

import sys


def main() -> int:
    """Returns the exit code (pipeline.messages.Exit, or StageExit for `stage`)."""
    if sys.argv[1:2] == ["stage"]:
        from pipeline.stage import main as stage

        if "--control-fd" in sys.argv:
            return int(stage(sys.argv[2:]))
        from pipeline.by_hand import main as by_hand

        def replay(*args: object, **options: object) -> int:
            from pipeline.replay import main as alone

            return int(alone(*args, **options))  # type: ignore[arg-type]

        return by_hand(sys.argv[2:], stage, replay)
    if sys.argv[1:2] == ["zygote"]:
        from pipeline.zygote import main as zygote

        return zygote(sys.argv[2:])
    from pipeline.cli import main as command

    return command(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
