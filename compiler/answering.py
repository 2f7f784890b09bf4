"""The profile of a device that answers: the one that was named, or what it is by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import devices, matching
from .errors import DeviceError
from .types import DeviceProfile

if TYPE_CHECKING:
    from ..backends.targets.on_device import DeviceTarget


def profile_of(there: DeviceTarget, device: str) -> DeviceProfile:
    """Return the profile of a device that answers, with its toolchain: the one that is named, or what it is itself.

    DeviceError where another device answers than the one that is named, or one that devices.yaml does not have.
    """
    name = device
    if device == "local" and not there.is_here:
        found = matching.device_of(there.probed)
        if found is None:
            what = f"devices.yaml has no such device: {matching.named(there.probed)}"
            raise DeviceError(what, where=f"--target {there.url}", fix="name the nearest one with --device")
        name = found
    profile = devices.find(name)
    wrong = None if profile.is_local else matching.fits(profile, there.probed)
    if wrong is not None:
        raise DeviceError(wrong.what, where=f"--device {name} --target {there.url}", fix=wrong.fix)
    return matching.toolchain(profile, there.probed)
