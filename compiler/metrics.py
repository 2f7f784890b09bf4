"""The user's own judge, named on the command line as MODULE:FUNCTION.

A function of one argument decodes one image's outputs (a dict of arrays by name, without the batch axis) into boxes,
an array (n, 6) of x1, y1, x2, y2, score, class: models are then compared by the F1 of their boxes, beside box labels
where they lie with the images (calib/box_labels.py), else the model's beside the original's. Beside labels an image's
boxes are fractions of the model's input where none of their coordinates exceeds 2, else pixels of it. A function of two
arguments scores one image's outputs against the original's, from 0 to 1.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

from .errors import DataError
from .fidelity import Metric


def load_metric(name: str) -> Metric:
    """Import `MODULE:FUNCTION` (also from the current folder, or `file.py:FUNCTION`). DataError if it is not there."""
    module_name, _, function_name = name.rpartition(":")
    if not module_name:
        raise DataError(
            "not of the form MODULE:FUNCTION", where=f"--metric {name}", fix="e.g. --metric mymetrics:decode"
        )
    module = _import(module_name, name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise DataError(
            f"{module_name} has no function {function_name!r}", where=f"--metric {name}", fix="check the name"
        )
    arguments = len(inspect.signature(function).parameters)
    if arguments == 1:
        return Metric(decode=function)
    if arguments == 2:
        return Metric(score=function)
    raise DataError(
        f"{function_name} takes {arguments} arguments",
        where=f"--metric {name}",
        fix="one (outputs -> boxes) or two (outputs, reference -> score)",
    )


def _import(module: str, name: str) -> object:
    path = Path(module)
    folder, stem = (path.parent, path.stem) if path.suffix == ".py" else (Path(), module)
    sys.path.insert(0, str(folder.resolve()))
    try:
        return importlib.import_module(stem)
    except ImportError as error:
        raise DataError(
            f"cannot import it: {error}",
            where=f"--metric {name}",
            fix="run where the module lies, or give file.py:FUNCTION",
        ) from error
    finally:
        sys.path.pop(0)
