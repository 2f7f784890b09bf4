"""What goes wrong on the device, in words for the person at the other end."""

from typing import Any, Dict, Optional, Sequence


class Fault(Exception):
    """Something that cannot be done here: what, how to fix it, and the ONNX nodes that are to blame if known."""

    def __init__(self, what: str, fix: Optional[str] = None, nodes: Sequence[str] = ()) -> None:
        super().__init__(what)
        self.what, self.fix, self.nodes = what, fix, list(nodes)

    def message(self) -> Dict[str, Any]:
        """Return it as it is sent."""
        return {"what": self.what, "fix": self.fix, "nodes": self.nodes}
