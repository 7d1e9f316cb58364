"""What completes a profile beside measurements: the base for what one host cannot tell, the datasheet, the network beyond."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from planner.errors import input_error
from planner.measure.records import Measurements
from planner.specs import files
from planner.specs.figures import Figure
from planner.specs.hardware import HardwareProfile, Tier

Data = dict[str, Any]
"""Plain data of a profile."""


@dataclass
class Sources:
    """Where figures come from that were not measured here."""

    measurements: Measurements
    base: HardwareProfile | None
    """For what one host cannot tell."""
    same: HardwareProfile | None
    """A shipped profile of this very device: its datasheet."""
    beyond: HardwareProfile | None
    """For the network beyond the node."""
    name: str
    node_size: int
    taken: list[str] = field(default_factory=list)
    """Names of figures that come from another profile, for the file's head."""

    @property
    def stamp(self) -> str:
        """Machine, software and date, for every measured figure."""
        return str(self.measurements.environment["stamp"])

    def measured(self, value: str | float, what: str, note: str = "", provenance: str = "measured") -> Data:
        """A figure of this machine."""
        found: Data = {"value": value, "provenance": provenance, "source": f"{what}; {self.stamp}"}
        return found | ({"note": note} if note else {})

    def copied(self, profile: HardwareProfile, key: str, what: Any) -> Any:
        """A figure or a block of another profile, with its own provenance and source."""
        if profile.name != self.name and f"{key} ({profile.name})" not in self.taken:
            self.taken.append(f"{key} ({profile.name})")
        return what.model_dump(mode="json", exclude_none=True, exclude_defaults=not isinstance(what, Tier | Figure))


def datasheet_of(device: str) -> str | None:
    """Name of the shipped profile that describes a device by the name that its driver gives; the plainest one."""
    shipped = files.shipped("hardware_profiles").items()
    named = [name for name, path in shipped if device in files.read_text(path)]  # reading all of them takes seconds
    found = [name for name in named if files.load_hardware(name)[0].device.name == device]
    return min(found, key=lambda name: (len(name), name)) if found else None


def sources(measurements: Measurements, base: str | None, beyond: str | None, name: str, node_size: int | None) -> Sources:
    """Load what the profile is completed from. Raises InputError where there is nothing to complete it from."""
    environment = measurements.environment
    cuda = environment["kind"] == "cuda"
    known = datasheet_of(environment["device"]) if cuda else None
    same = files.load_hardware(known)[0] if known else None
    chosen = files.load_hardware(base)[0] if base else same
    if chosen is not None and (chosen.device.kind == "cpu") == cuda:
        why = f"it is of a {chosen.device.kind} device, this machine's is {environment['kind']}"
        raise input_error("PLN646", f"--base {base} does not fit this machine", why, "name a profile of the same kind")
    if chosen is not None and chosen.device.name == environment["device"]:
        same = chosen
    size = node_size or int(environment["local_devices"] if cuda else environment["devices"])
    world = int(environment["devices"])
    if size < world or size % world:
        why = f"{world} devices were measured"
        raise input_error("PLN647", f"--node-size {size} does not fit the machine", why, f"give a multiple of {world}")
    outer = files.load_hardware(beyond)[0] if beyond else chosen
    if chosen is None and size > world:
        what = f"{world} of {size} devices cannot tell the network of the node"
        raise input_error("PLN642", what, "no profile stands in for it", "name one with --base, or measure all devices")
    if chosen is None and size == 1:
        raise input_error("PLN642", "one device cannot tell a network", "", "name a profile with --base")
    return Sources(measurements, chosen, same, outer, name, size)
