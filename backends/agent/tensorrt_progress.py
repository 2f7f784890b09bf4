"""How far a build is, from TensorRT's own monitor, which it has from 9.0 on."""

from typing import Any, Dict, Optional

from .opened import Tell


def monitor(trt: Any, tell: Tell) -> Any:
    """Return a monitor for a builder's configuration, which tells each phase's steps.

    `raised` is what `tell` raised, None while it raised nothing; the build is stopped then.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # its module has no types
        """Tells how far each phase of the build is."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: Dict[str, int] = {}
            self.raised: Optional[BaseException] = None

        def phase_start(self, phase_name: str, parent_phase: Optional[str], num_steps: int) -> None:
            """Take note of a phase's length."""
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Tell, and return whether to go on."""
            if self.raised is None:
                try:
                    tell(phase_name.lower(), step + 1, self.steps.get(phase_name))
                except BaseException as error:  # it cannot pass through TensorRT: raised when the build has stopped
                    self.raised = error
            return self.raised is None

        def phase_finish(self, phase_name: str) -> None:
            """Forget the phase."""
            self.steps.pop(phase_name, None)

    return Monitor()
