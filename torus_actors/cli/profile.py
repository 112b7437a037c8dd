"""The user's configuration file: what to use when neither options nor the environment say.

``$XDG_CONFIG_HOME/torus-actors/config.toml``, a table for each profile::

    [default]
    metadata = "etcd://10.0.0.1:2379"
    secret-file = "/etc/torus-actors/secret"

``$TORUS_PROFILE`` chooses the profile.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from torus_actors.errors import Invalid

KEYS = ("metadata", "secret-file")
"""What a profile may hold."""

CONFIG_BYTES_MAX = 1 << 20
"""A larger file is no configuration: a device, say, or an image."""

_PROFILE = re.compile(r"[A-Za-z0-9_-]{1,64}")

Profiles = dict[str, dict[str, str]]


def expanded(path: Path | str) -> Path:
    """A path with its ``~`` put in, absolute.

    Raises:
        Invalid: nobody knows whose home directory that is.
    """
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise Invalid(f"{path}: no such home directory; set HOME, or give a whole path") from error


def read_config(path: Path) -> str:
    """The text of a configuration file.

    Raises:
        Invalid: it is too large, or not UTF-8.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(CONFIG_BYTES_MAX + 1)
    if len(data) > CONFIG_BYTES_MAX:
        raise Invalid(f"{path} is no configuration: it has more than {CONFIG_BYTES_MAX >> 20} MiB")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Invalid(f"{path} is not TOML, which is UTF-8: {error}") from error


def config_path() -> Path:
    """Where the file is, if it is there."""
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return expanded(home) / "torus-actors" / "config.toml"


def data_home() -> Path:
    """Where data goes unless told otherwise."""
    home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return expanded(home) / "torus-actors"


def profile_name() -> str:
    """The profile in use."""
    return os.environ.get("TORUS_PROFILE") or "default"


def load_profiles(path: Path) -> Profiles:
    """All profiles; none if there is no file.

    Raises:
        Invalid: the file cannot be understood.
    """
    try:
        text = read_config(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    import tomllib

    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Invalid(f"{path} is not TOML: {error}") from error
    profiles: Profiles = {}
    for name, values in found.items():
        if not isinstance(values, dict) or not all(
            key in KEYS and isinstance(value, str) for key, value in values.items()
        ):
            raise Invalid(f"{path}: profile {name} may hold {' and '.join(KEYS)}, as text")
        if any("\0" in value for value in values.values()):
            raise Invalid(f"{path}: there is a NUL in profile {name}, which no name can hold")
        profiles[name] = dict(values)
    return profiles


def save_profiles(path: Path, profiles: Profiles) -> None:
    """Write all profiles.

    Raises:
        Invalid: a profile's name, or a value, cannot be written.
    """
    lines: list[str] = []
    for name, values in sorted(profiles.items()):
        if not _PROFILE.fullmatch(name):
            raise Invalid(f"{name!r} is no profile name: use letters, digits, '-' and '_'")
        if values:
            lines.append(f"[{name}]")
            lines += [f"{key} = {_quoted(value)}" for key, value in sorted(values.items())]
            lines.append("")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text("\n".join(lines), "utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def changed_profiles(path: Path) -> Iterator[Profiles]:
    """All profiles, to be changed; written at the end. One command at a time: none undoes another.

    Raises:
        Invalid: the file cannot be understood, or what it is to hold cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(directory, fcntl.LOCK_EX)
        profiles = load_profiles(path)
        yield profiles
        save_profiles(path, profiles)
    finally:
        os.close(directory)


def _quoted(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Invalid(f"{text!r} cannot be kept in a profile, which is UTF-8") from error
    # A JSON string is a TOML string too, control characters and all but this one.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def profile_value(key: str) -> str | None:
    """What the profile in use says, if anything."""
    return load_profiles(config_path()).get(profile_name(), {}).get(key)
