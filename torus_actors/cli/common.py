"""What the three commands have in common: options, errors as one line, exit codes, logging.

Every option here is accepted before and behind the subcommand, and the last one wins. Exit codes:
0 done, 1 refused or failed, 2 bad usage.
"""

from __future__ import annotations

import asyncio
import functools
import io
import logging
import math
import os
import shlex
import stat
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from torus_actors import __version__
from torus_actors.aoe.protocol import parse_mac
from torus_actors.cli.entry import loaded
from torus_actors.cli.log_floods import FloodGate
from torus_actors.cli.profile import expanded, profile_value
from torus_actors.cli.units import parse_size
from torus_actors.errors import Invalid, TorusError
from torus_actors.model.addresses import format_address, parse_address

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    # Not generic in the older versions of click that will do.
    ParamType = click.ParamType

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_METADATA = "torus://127.0.0.1:40000"
METADATA_ENV = "TORUS_METADATA"
SECRET_ENV = "TORUS_SECRET_FILE"
SECRET_BYTES_MIN = 16
SECRET_BYTES_MAX = 4096
SECRET_FILE_BYTES_MAX = 2 * SECRET_BYTES_MAX
"""With white space; of a disk that is named by mistake no more is read."""

SCHEMES = ("torus", "etcd")
"""And memory:// is for tests inside one process: nobody else could ask it."""
LOG_LEVELS = ("debug", "info", "warning", "error")

LIFECYCLE = logging.getLogger("torus_actors.lifecycle")
"""The few lines that a daemon says at every level: up, stopping, stopped."""


@dataclass(slots=True)
class Settings:
    """What the common options said; None where they said nothing."""

    metadata: str | None = None
    secret_file: str | None = None
    log_level: str | None = None
    verbose: int = 0
    _read: tuple[str, bytes] | None = field(default=None, repr=False)

    def metadata_url(self, default: str = DEFAULT_METADATA) -> str:
        """Option, then environment, then profile, then the default.

        Raises:
            Invalid: what the environment or the profile says is no metadata URL.
        """
        if self.metadata is not None:
            return self.metadata
        for where, value in (
            (f"${METADATA_ENV}", os.environ.get(METADATA_ENV)),
            ("the profile", profile_value("metadata")),
        ):
            if value:
                try:
                    return parse_metadata_url(value)
                except ValueError as error:
                    raise Invalid(f"{where} says {error}") from error
        return default

    def chatter(self) -> list[str]:
        """Options that make another command log as much as this one."""
        level = [] if self.log_level is None else ["--log-level", self.log_level]
        return level + ["-v"] * self.verbose

    def secret(self) -> bytes | None:
        """The cluster secret, if a file with one is named anywhere; read once: it may be a pipe.

        Raises:
            Invalid: the file holds none.
            OSError: it cannot be read.
        """
        path = self.secret_file or os.environ.get(SECRET_ENV) or profile_value("secret-file")
        if not path:
            return None
        path = str(expanded(path))
        if self._read is not None and self._read[0] == path:
            return self._read[1]
        with open(path, "rb") as file:
            secret = file.read(SECRET_FILE_BYTES_MAX).strip()
            more = "more than " if file.read(1) else ""
            warn_of_strangers("secret", path, os.fstat(file.fileno()))
        if more or not SECRET_BYTES_MIN <= len(secret) <= SECRET_BYTES_MAX:
            raise Invalid(
                f"secret file {path} holds {more}{len(secret)} bytes: a secret has "
                f"{SECRET_BYTES_MIN} to {SECRET_BYTES_MAX}; make one with: "
                "(umask 077; openssl rand -hex 32 > FILE)"
            )
        self._read = path, secret
        return secret


def warn_of_strangers(what: str, path: str, found: os.stat_result) -> None:
    """Say so, once, where everybody on this machine can read a secret, or put another in its place.

    Not refused, as ssh would: containers are often given their secrets like that, where nobody else
    is, and a node that does not start costs copies. A group may be meant to share one.

    Args:
        what: is in the file.
        path: of the file.
        found: what the system says of it.
    """
    if stat.S_ISREG(found.st_mode) and found.st_mode & (stat.S_IROTH | stat.S_IWOTH):
        _warn_once(what, path)


@functools.cache
def _warn_once(what: str, path: str) -> None:
    context = click.get_current_context(silent=True)
    program = "" if context is None else f"{context.find_root().info_name}: "
    click.echo(
        f"{program}warning: every user of this machine can use the {what} in {path}: "
        f"chmod 600 {shlex.quote(path)}",
        err=True,
    )


def parse_metadata_url(text: str) -> str:
    """A metadata URL in its one spelling.

    Raises:
        ValueError: it is none.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in SCHEMES:
        raise ValueError(
            f"{text!r} is no metadata URL: use torus://HOST:PORT or etcd://HOST:PORT[,HOST:PORT]"
        )
    rest = rest.removesuffix("/")
    hosts = [format_address(parse_address(endpoint)) for endpoint in rest.split(",")]
    if scheme == "torus" and len(hosts) != 1:
        raise ValueError(f"{text!r} must name one node")
    return f"{scheme}://{','.join(hosts)}"


class _Parsed(ParamType):
    """An option or argument read by a function that raises ValueError."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse it, or say what is wrong."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Named(click.Path):
    """A path. An empty name is none: it would be that of the directory where this started."""

    what: str

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check it, or say what is wrong."""
        if not os.fspath(value):
            self.fail(f"it is empty: name a {self.what}, or leave the option out", param, ctx)
        return super().convert(value, param, ctx)


class DirectoryName(_Named):
    """A directory to store in."""

    what = "directory"

    def __init__(self) -> None:
        super().__init__(path_type=Path, file_okay=False)


class SocketName(_Named):
    """Where a unix socket shall be."""

    what = "socket"

    def __init__(self) -> None:
        super().__init__(path_type=Path)


class Seconds(click.FloatRange):
    """A number, and not the one that is none: nothing ever takes longer than that."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse it, or say what is wrong."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is no number", param, ctx)
        return number


def _named_size(text: str) -> tuple[str, int]:
    name, separator, size = text.partition(":")
    if not separator or not name:
        raise ValueError(f"{text!r} is no NAME:SIZE")
    return name, parse_size(size)


SIZE = _Parsed("size", lambda text: parse_size(text))
ADDRESS = _Parsed("host:port", parse_address)
METADATA_URL = _Parsed("url", parse_metadata_url)
NAMED_SIZE = _Parsed("name:size", _named_size)
MAC = _Parsed("mac", parse_mac)


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    assert param.name is not None
    if value is None or value == 0:
        return
    settings = ctx.ensure_object(Settings)
    source = ctx.get_parameter_source(param.name)
    # A configuration file does not overrule what was said before the subcommand.
    if source is click.core.ParameterSource.DEFAULT_MAP and getattr(settings, param.name):
        return
    setattr(settings, param.name, value)


def _common_options() -> list[click.Parameter]:
    shared: dict[str, Any] = {"expose_value": False, "callback": _remember}
    return [
        click.Option(
            ["-C", "--metadata"],
            type=METADATA_URL,
            metavar="URL",
            help=f"Metadata of the cluster. Default: ${METADATA_ENV}, the profile, "
            f"{DEFAULT_METADATA}.",
            **shared,
        ),
        click.Option(
            ["--secret-file"],
            metavar="FILE",
            help=f"File with the cluster secret. Default: ${SECRET_ENV}, the profile.",
            **shared,
        ),
        click.Option(
            ["-v", "--verbose"], count=True, help="Say more; twice for everything.", **shared
        ),
        click.Option(["--log-level"], type=click.Choice(LOG_LEVELS), help="What to log.", **shared),
    ]


class Command(click.Command):
    """A command that takes the common options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _common_options()

    def invoke(self, ctx: click.Context) -> Any:
        """Run it; Ctrl-C is a failure like others, where click would print an empty line too."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Failed("interrupted") from error


class Group(click.Group):
    """A group of commands; takes the common options too."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _common_options()


Group.group_class = Group

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 90}
"""Click settings of the three root groups."""


def version_option() -> Callable[[F], F]:
    """``--version`` of a root group."""
    return click.version_option(__version__, message="%(prog)s (torus-actors) %(version)s")


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

lease_option = click.option(
    "--lease",
    type=click.IntRange(1, 3600),
    metavar="SECONDS",
    help="How long the cluster waits for this process when it falls silent, before it counts as "
    "gone and its volumes may be opened elsewhere. Default: 6",
)


class Failed(TorusError):
    """The command did what it could, and the result is a failure; the text says which."""


def one_line(error: BaseException) -> str:
    """An error as one plain line."""
    if isinstance(error, OSError) and not isinstance(error, TorusError):
        what = error.strerror or str(error) or type(error).__name__
        text = f"{error.filename}: {what}" if error.filename else what
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def _is_of_stdout(error: BaseException) -> bool:
    """Whether standard output is what failed; then it is left alone from now on."""
    at = error.__traceback__
    if at is None or isinstance(error, TorusError) or getattr(error, "filename", None):
        return False
    while at.tb_next is not None:
        at = at.tb_next
    # Such an error does not say of what it is; but who writes there are these, and nobody else.
    writer = at.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    if writer not in ("click", "rich") and at.tb_frame.f_code is not run_main.__code__:
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def run_main(command: click.Command, program: str, args: Sequence[str] | None = None) -> None:
    """Run a command line and exit as the contract says; never returns.

    Args:
        command: the root group.
        program: its name, for messages.
        args: instead of ``sys.argv[1:]``.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As standard error does: a path, or a zone's name, may have what it cannot encode.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = command.main(
            list(args) if args is not None else None,
            prog_name=program,
            obj=Settings(),
            standalone_mode=False,
        )
        if sys.stdout is not None:  # closed, by >&-
            sys.stdout.flush()
    except click.ClickException as error:
        if sys.stderr is not None:  # click would write to standard output instead
            error.show()
        status = 2 if isinstance(error, click.UsageError) else 1
    except (KeyboardInterrupt, click.Abort, asyncio.CancelledError):
        click.echo(f"{program}: interrupted", err=True)
        status = 1
    except BrokenPipeError:
        # Whoever read our output has gone; flushing at exit must not complain again.
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (TorusError, OSError) as error:
        where = "standard output: " if _is_of_stdout(error) else ""
        click.echo(f"{program}: {where}{one_line(error)}", err=True)
        status = 1
    sys.exit(status if isinstance(status, int) else 0)


class _PlainFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text.replace(record.levelname, record.levelname.lower(), 1)


def set_up_logging(settings: Settings, *, daemon: bool) -> None:
    """Plain lines on stderr.

    Args:
        settings: may say how much.
        daemon: warnings are logged and so are lifecycle lines; the other commands say what went
            wrong in one line of their own, and log nothing unless asked to.
    """
    if settings.log_level is not None:
        level = settings.log_level.upper()
    elif settings.verbose:
        level = "DEBUG" if settings.verbose > 1 else "INFO"
    else:
        level = "WARNING" if daemon else "CRITICAL"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainFormatter())
    if daemon and level != "DEBUG":
        handler.addFilter(FloodGate())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # These have much to say about their own insides.
    for name in ("pykka", "asyncio", "grpc", "aiohttp.access"):
        logging.getLogger(name).setLevel(max(logging.INFO, logging.getLevelName(level)))
    if daemon:
        LIFECYCLE.setLevel(logging.INFO)


def run(settings: Settings, work: Coroutine[Any, Any, T]) -> T:
    """Run a one-shot command's work on a plain loop, which starts faster than uvloop."""
    set_up_logging(settings, daemon=False)
    loaded()
    return asyncio.run(work)
