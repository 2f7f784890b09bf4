"""What the runtimes have in common once a model is opened."""

import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from .faults import Fault
from .tensors import Described, Tensor

#: Told how far something is: what, how much is done, of how much (None: not known).
Tell = Callable[[str, int, Optional[int]], None]


class Kernel(NamedTuple):
    """One kernel of a call: its name, the ONNX nodes that it computes as far as the runtime says, milliseconds."""

    name: str
    nodes: Tuple[str, ...]
    ms: float


class Opened:
    """A model that is ready to run. What a runtime cannot do returns None; what fails raises Fault.

    `in_blocks`: a sample is the calls of several seconds of a process of its own, not one call.
    """

    inputs: List[Described] = []
    outputs: List[Described] = []
    provider: str = ""
    in_blocks: bool = False
    #: What is to be told beside the measurement: how an engine was built, for example.
    facts: Dict[str, Any] = {}

    def feed(self, tensors: Dict[str, Tensor]) -> None:
        """Take an input; its shapes may be new. It stays until another one is given."""
        raise NotImplementedError

    def given(self, tensors: Dict[str, Tensor]) -> List[Tensor]:
        """Return the inputs in the model's order. Fault where one is missing."""
        missing = [one.name for one in self.inputs if one.name not in tensors]
        if missing:
            raise Fault("the model's input %s was not given" % missing[0])
        return [tensors[one.name] for one in self.inputs]

    def call(self) -> None:
        """Run once, to the end."""
        raise NotImplementedError

    def sample(self) -> List[float]:
        """Return milliseconds of calls: one call untimed, then one timed; of many calls where `in_blocks`."""
        self.call()
        start = time.perf_counter()
        self.call()
        return [(time.perf_counter() - start) * 1e3]

    def with_copies(self) -> Optional[float]:
        """Return the milliseconds of a call with its inputs brought in and its outputs fetched."""
        return None

    def throughput(self, seconds: float) -> Optional[float]:
        """Return calls a second when the next one need not wait for the last one's end."""
        return None

    def read(self) -> Dict[str, Tensor]:
        """Return the outputs of the last call."""
        raise NotImplementedError

    def profile(self, runs: int) -> Optional[List[Kernel]]:
        """Return the kernels in the order in which they run, their times the medians of so many calls."""
        return None

    def close(self) -> None:
        """Let go of what is held."""
