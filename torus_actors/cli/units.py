"""Sizes and times, as people write and read them."""

from __future__ import annotations

import datetime
import math
import re

# Without ASCII, letters that are s or k in capitals only would do as units too.
_ANY_CASE = re.ASCII | re.IGNORECASE
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmgtp]?)(?:i?b)?", _ANY_CASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[smhd]?)", _ANY_CASE)
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")

SIZE_TEXT_MAX = 64
"""Characters of a size; what is longer is none."""


def parse_size(text: str) -> int:
    """Bytes from ``1GiB``, ``512K``, ``1.5G`` or ``4096``; every unit is a power of 1024.

    Raises:
        ValueError: it is no size, or not a whole number of bytes.
    """
    match = _SIZE.fullmatch(text.strip()) if len(text) <= SIZE_TEXT_MAX else None
    if match is None:
        shown = repr(text[:SIZE_TEXT_MAX])
        raise ValueError(f"{shown} is no size: write it as 10GiB, 512KiB, 4G or in bytes")
    scale: int = 1024 ** _POWERS[match["unit"].lower()]
    whole, _, fraction = match["number"].partition(".")
    size = int(whole) * scale
    if fraction:
        more, rest = divmod(int(fraction) * scale, 10 ** len(fraction))
        if rest:
            raise ValueError(f"{text!r} is not a whole number of bytes")
        size += more
    if size <= 0:
        raise ValueError(f"{text!r} is no size: it must be above 0")
    return size


def format_size(size: float) -> str:
    """A size for a person, at most 10 characters: ``512 KiB``, ``1.5 GiB``."""
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    if size == int(size) or size >= 100:
        return f"{size:.0f} {unit}"
    return f"{size:.1f} {unit}"


def parse_seconds(text: str) -> float:
    """Seconds from ``90s``, ``10m``, ``2h``, ``1d`` or ``90``.

    Raises:
        ValueError: it is no duration above 0.
    """
    match = _DURATION.fullmatch(text.strip())
    seconds = 0.0 if match is None else float(match["number"]) * _SECONDS[match["unit"].lower()]
    if not 0 < seconds < math.inf:
        raise ValueError(f"{text!r} is no duration: write it as 90s, 10m, 2h or 1d")
    return seconds


def format_seconds(seconds: float) -> str:
    """A duration for a person: ``3s``, ``2m10s``, ``5h02m``, ``4d3h``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole // 60 % 60:02}m"
    return f"{whole // 86400}d{whole // 3600 % 24}h"


def format_moment(seconds: float) -> str:
    """A moment for a person, from seconds since 1970."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")
