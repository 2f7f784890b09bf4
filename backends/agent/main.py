"""The program: `serve FOLDER` and `work FOLDER` are for edgec; without arguments it measures the bundle it lies in."""

import os
import sys


def main() -> int:
    """Do what the command line says; return the exit code."""
    sys.argv[0] = os.path.abspath(sys.argv[0])
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    if what == "serve":
        from . import serve

        return serve.serve(sys.argv[2])
    if what == "work":
        from . import worker

        return worker.main()
    from . import alone

    return alone.main(sys.argv[1:])
