"""The board under the node: clock, disk, wear, voltage, temperature. Read where the kernel tells; what it does not is passed over.

Sources: proc(5) mounts and meminfo; ext4's errors_count and MMC's life_time, pre_eol_info (Documentation/ABI/testing in the kernel);
rpi_volt's in0_lcrit_alarm and the firmware's get_throttled bits (Raspberry Pi documentation, vcgencmd).
"""

import contextlib
import errno
import os
import shutil
import tempfile
import time
from pathlib import Path

import msgspec

from node.doctor.finding import Finding
from node.update.rules import BUILT_AT

LIFETIME_S = 20 * 365 * 86_400  # seconds after this program was made; a clock beyond is not believed
DISK_BAD, DISK_WARN = 128 << 20, 512 << 20  # bytes free
INODES_BAD = 1_000  # free; an answer needs none, a release a few, a spool file four
SYNC_SLOW_S = 1.0  # a healthy SD card syncs 4 kB in 0.02 s
PROBE_BYTES = 4096
HOT_WARN, HOT_BAD = 75.0, 85.0  # degrees Celsius; a Pi throttles at 80 and 85
KMSG_BYTES = 256 * 1024  # of the kernel's latest messages
KMSG_BAD = ("I/O error, dev {device}", "error (device {part})", "Remounting filesystem read-only", "mmc0: error")
LIFE_STEPS = 10  # of an MMC's estimated life: each is a tenth


class Places(msgspec.Struct, frozen=True):
    """Where the kernel tells about the machine."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    run: Path = Path("/run")
    kmsg: Path = Path("/dev/kmsg")


class Mount(msgspec.Struct, frozen=True):
    """The file system a folder is on."""

    device: str  # "/dev/mmcblk0p2", "tmpfs"
    point: str
    read_only: bool

    @property
    def part(self) -> str:
        """Name of the partition: "mmcblk0p2"; "" for what is not a device."""
        return self.device.removeprefix("/dev/") if self.device.startswith("/dev/") else ""


def clock(now: float, *, floor: float = 0.0, places: Places | None = None) -> Finding:
    """Whether the clock can be right. Answers need none; certificates and releases do.

    Args:
        floor: seconds since 1970, the newest time the coordinator signed: it cannot be earlier.
    """
    places = places or Places()
    shown = _day(now)
    if now < BUILT_AT:
        return Finding(
            "clock", "bad", f"it shows {shown}, before this program was made ({_day(BUILT_AT)})",
            "set it (date -s), or fit a clock chip; answers go on",
        )  # fmt: skip
    if now < floor:
        return Finding("clock", "bad", f"it shows {shown}, and the coordinator signed a release at {_day(floor)}", "set it (date -s)")
    if now > BUILT_AT + LIFETIME_S:
        return Finding("clock", "bad", f"it shows {shown}", "set it (date -s): certificates and releases look expired")
    chip, synchronised = any((places.sys / "class/rtc").glob("rtc*")), (places.run / "systemd/timesync/synchronized").exists()
    if not chip and not synchronised:
        return Finding("clock", "warn", f"{shown}; no clock chip, and no time server was reached since the start", "fit a clock chip (RTC)")
    return Finding("clock", "good", shown + (", set by a time server" if synchronised else ", kept by a clock chip"))


def disk(state: Path, *, places: Places | None = None) -> Finding:
    """Whether the state folder can be written and synced, with room to spare. Where it exists, one small file is written and removed."""
    here = next((folder for folder in (state, *state.parents) if folder.exists()), Path("/"))
    mounted = mount_of(here, places or Places())
    if mounted and mounted.read_only:
        return Finding(
            "disk", "bad", f"{mounted.device} is mounted read-only",
            "the kernel does that after errors: look at dmesg, replace the card, then boot again",
        )  # fmt: skip
    if not os.access(here, os.W_OK):
        return Finding("disk", "bad", f"{here} cannot be written", "run it with sudo; if it stays, give the node's user the folder")
    free, inodes = shutil.disk_usage(here).free, os.statvfs(here)
    if inodes.f_files and inodes.f_favail < INODES_BAD:
        return Finding("disk", "bad", f"{inodes.f_favail} inodes free on {here}", "too many small files: find and delete them")
    if free < DISK_BAD:
        return Finding("disk", "bad", f"{free >> 20} MiB free on {here}", "free some space: the node stops storing answers when it is full")
    try:
        took = _write(here) if here == state else 0.0
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        return Finding(
            "disk", "bad", f"writing to {here} failed: {error.strerror} ({name})", "copy what you need away and replace the card or disk"
        )
    if took > SYNC_SLOW_S:
        return Finding("disk", "warn", f"{took:.1f} s to sync {PROBE_BYTES} bytes on {here}", "a worn or failing card: replace it soon")
    if free < DISK_WARN:
        return Finding("disk", "warn", f"{free >> 20} MiB free on {here}", "a new release may not fit")
    return Finding("disk", "good", f"{free >> 20} MiB free on {here}")


def wear(state: Path, *, places: Places | None = None) -> Finding:
    """What the kernel and the card say about themselves."""
    places = places or Places()
    mounted = mount_of(state, places)
    part = mounted.part if mounted else ""
    if not part:
        return Finding("wear", "good", "nothing is told about this disk")
    device = whole_device(part, places)
    errors = _number(places.sys / "fs/ext4" / part / "errors_count")
    if errors:
        return Finding("wear", "bad", f"the file system on {part} has counted {errors} errors", "back up, run fsck, replace the card")
    if lines := _complaints(device, part, places):
        return Finding("wear", "bad", f"the kernel reports: {lines[-1]}", "back up now and replace the card or its cable")
    life = max((int(word, 16) for word in _text(places.sys / "block" / device / "device/life_time").split()), default=0)
    end = _number(places.sys / "block" / device / "device/pre_eol_info", base=16)
    if end >= 3 or life > LIFE_STEPS:
        return Finding("wear", "bad", f"{device} is past its estimated life", "replace it now")
    if end == 2 or life >= LIFE_STEPS - 1:
        return Finding("wear", "warn", f"{device} has used {10 * max(life, 8)}% of its estimated life", "have a new card ready")
    if failed := _number(places.sys / "block" / device / "device/ioerr_cnt", base=16):
        return Finding("wear", "warn", f"{device} has counted {failed} failed commands", "watch it: more of them mean a failing disk")
    return Finding("wear", "good", f"{device}: nothing wrong is told" + (f", {10 * life}% of its life used" if life else ""))


def supply(places: Places) -> Finding:
    """Whether the board gets enough voltage, as a Raspberry Pi tells it."""
    advice = "a stronger supply or a shorter, thicker cable; low voltage corrupts cards"
    for name in sorted((places.sys / "class/hwmon").glob("hwmon*/name")):
        if _text(name) == "rpi_volt":
            if _number(name.with_name("in0_lcrit_alarm")):
                return Finding("supply", "bad", "the voltage is too low now", advice)
            return Finding("supply", "good", "the voltage is high enough")
    bits = _number(places.sys / "devices/platform/soc/soc:firmware/get_throttled", base=16)
    if bits & 1:
        return Finding("supply", "bad", "the voltage is too low now", advice)
    if bits & (1 << 16):
        return Finding("supply", "warn", "the voltage was too low since the start", advice)
    return Finding("supply", "good", "no low voltage is told")


def temperature(places: Places) -> Finding:
    """The warmest zone."""
    zones = [_number(zone) / 1000 for zone in (places.sys / "class/thermal").glob("thermal_zone*/temp")]
    if not zones:
        return Finding("temperature", "good", "none is told")
    warmest = max(zones)
    if warmest >= HOT_BAD:
        return Finding("temperature", "bad", f"{warmest:.0f} degrees: the processor is slowed down", "shade and air; look at the fan")
    if warmest >= HOT_WARN:
        return Finding("temperature", "warn", f"{warmest:.0f} degrees", "near the limit at which the processor slows down")
    return Finding("temperature", "good", f"{warmest:.0f} degrees")


def free_memory(places: Places) -> int:
    """Bytes a new model may take: what the kernel can give, or the container's limit allows."""
    told = dict(line.split(":", 1) for line in _text(places.proc / "meminfo").splitlines() if ":" in line)
    found = [int(told["MemAvailable"].split()[0]) << 10] if "MemAvailable" in told else []
    limit = _text(places.sys / "fs/cgroup/memory.max")
    if limit.isdigit():
        found.append(max(0, int(limit) - _number(places.sys / "fs/cgroup/memory.current")))
    return min(found, default=0)


def mount_of(folder: Path, places: Places) -> Mount | None:
    """The file system that `folder` is on: the longest mount point above it, the last one mounted there."""
    found: Mount | None = None
    for line in _text(places.proc / "mounts").splitlines():
        words = line.split()
        if len(words) < 4:
            continue
        point = words[1].replace("\\040", " ")
        if folder.resolve().is_relative_to(point) and (found is None or len(point) >= len(found.point)):
            found = Mount(words[0], point, "ro" in words[3].split(","))
    return found


def whole_device(part: str, places: Places) -> str:
    """ "mmcblk0" of "mmcblk0p2", as the kernel nests them."""
    home = (places.sys / "class/block" / part).resolve()
    return home.parent.name if (home / "partition").exists() else part


def _write(folder: Path) -> float:
    """Write, sync, read back and remove one small file; the seconds it took."""
    began = time.monotonic()
    handle, name = tempfile.mkstemp(prefix=".doctor-", dir=folder)
    try:
        os.write(handle, b"\xa5" * PROBE_BYTES)
        os.fsync(handle)
        if os.pread(handle, PROBE_BYTES, 0) != b"\xa5" * PROBE_BYTES:
            raise OSError(errno.EIO, "what was written did not come back")
    finally:
        os.close(handle)
        Path(name).unlink()
    return time.monotonic() - began


def _complaints(device: str, part: str, places: Places) -> list[str]:
    """The kernel's words about this disk; none where its log may not be read."""
    try:
        handle = os.open(places.kmsg, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return []
    text, size = list[str](), 0
    with contextlib.suppress(OSError):  # the end of what there is (EAGAIN), or records lost meanwhile (EPIPE)
        while size < KMSG_BYTES and (block := os.read(handle, 8192)):  # a record a read from the device, a block from a file
            text.append(block.decode("utf-8", "replace"))
            size += len(block)
    os.close(handle)
    bad = [pattern.format(device=device, part=part) for pattern in KMSG_BAD]
    lines = [line.rpartition(";")[2].strip() for line in "".join(text).splitlines()]
    return [line for line in lines if any(pattern in line for pattern in bad)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path, *, base: int = 10) -> int:
    try:
        return int(_text(path) or "0", base)
    except ValueError:
        return 0


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(max(0.0, seconds)))
