"""What people type, what they are shown, and how commands end; nothing is started here."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import io
import logging
import os
import random
import socket
import ssl
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from tests.fakes import virtual
from torus_actors.cli.blk import _tls_context
from torus_actors.cli.blk import cli as blk
from torus_actors.cli.common import (
    Command,
    Failed,
    Settings,
    one_line,
    parse_metadata_url,
    run_main,
)
from torus_actors.cli.ctl import cli as ctl
from torus_actors.cli.dev import DevCluster, DevConfig
from torus_actors.cli.node import SIZE_DEFAULT, store_size
from torus_actors.cli.node import cli as node
from torus_actors.cli.nodes import pick, short
from torus_actors.cli.output import print_json, print_table
from torus_actors.cli.profile import (
    CONFIG_BYTES_MAX,
    changed_profiles,
    config_path,
    load_profiles,
    save_profiles,
)
from torus_actors.cli.units import (
    format_seconds,
    format_size,
    parse_seconds,
    parse_size,
)
from torus_actors.errors import Exists, Invalid, NotExist, TorusError
from torus_actors.metadata.memory import MemoryStore
from torus_actors.metadata.records import GlobalMetadata, PeerInfo
from torus_actors.metadata.service import MetadataService
from torus_actors.model import rings
from torus_actors.model.addresses import check_free, format_address, parse_address
from torus_actors.model.peers import Peer
from torus_actors.scenarios.__main__ import main as scenarios
from torus_actors.scenarios.processes import free_ports

GIB = 1 << 30


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is configured."""
    for name in ("TORUS_METADATA", "TORUS_SECRET_FILE", "TORUS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GiB", GIB),
        ("1gib", GIB),
        ("10G", 10 * GIB),
        ("512KiB", 512 << 10),
        ("1.5 GB", 3 * GIB // 2),
        ("4096", 4096),
        ("7b", 7),
        ("2TiB", 2048 * GIB),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    """Units are powers of 1024, with or without i and B, in any case."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "G", "-1", "0", "0GiB", "1.0001", "1XB", "1 2", "0x10", "1\u212a", "9" * 5000]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    """The error names what was typed."""
    with pytest.raises(ValueError, match=r"size|whole number"):
        parse_size(text)


@pytest.mark.parametrize("size", [1, 1023, 1024, 1536, 999 << 20, GIB, 5 << 40, 1 << 59])
def test_sizes_are_shown_short_and_can_be_read_back(size: int) -> None:
    """At most 10 characters, within 5 % of the truth, and as they can be typed."""
    shown = format_size(size)
    assert len(shown) <= 10
    assert parse_size(shown.replace(" ", "")) == pytest.approx(size, rel=0.05)


def test_durations_are_shown_in_two_units() -> None:
    """Seconds, then the two largest units."""
    shown = [format_seconds(s) for s in (0, 59.9, 60, 3599, 3600, 86399, 90000)]
    assert shown == ["0s", "59s", "1m00s", "59m59s", "1h00m", "23h59m", "1d1h"]


@pytest.mark.parametrize("text", ["127.0.0.1:40000", "host.example:1", "[::1]:65535"])
def test_addresses_are_read_and_written_alike(text: str) -> None:
    """The two functions are inverse."""
    assert format_address(parse_address(text)) == text


def test_localhost_has_one_spelling() -> None:
    """So that a node finds its own address in a metadata URL."""
    assert parse_address("localhost:5") == ("127.0.0.1", 5)
    assert parse_metadata_url("torus://localhost:5/") == "torus://127.0.0.1:5"


@pytest.mark.parametrize("text", ["0:0:0:0:0:0:0:1", "0::1", "::0001"])
def test_an_ipv6_address_has_one_spelling(text: str) -> None:
    """For the same reason; and what is loopback, or everything, is known to be that."""
    assert parse_address(f"[{text}]:5") == ("::1", 5)
    assert parse_metadata_url(f"torus://[{text}]:5/") == "torus://[::1]:5"
    assert parse_address("[FE80::A%eth0]:5") == ("fe80::a%eth0", 5)


@pytest.mark.parametrize(
    "text",
    [
        *("", "host", ":1", "host:", "host:0", "host:65536", "a b:1", "a..b:1", "\udcff:1"),
        *("::1:5", "[::1:5", "::1]:5", "[[::1]]:5", "[::g]:5", "[host]:5", "[]:5"),
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    """Also an IPv6 address without brackets, whose port nobody could tell."""
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_address(text)


def test_metadata_urls_are_checked() -> None:
    """Schemes and addresses; several of them for etcd only."""
    assert parse_metadata_url("etcd://a:1,b:2") == "etcd://a:1,b:2"
    # Of memory:// a node alone knew, and waited for ever that somebody made a cluster in it.
    for bad in ("", "a:1", "http://a:1", "torus://a", "torus://a:1,b:2", "etcd://", "memory://"):
        with pytest.raises(ValueError, match=r"URL|HOST:PORT|one node"):
            parse_metadata_url(bad)


def test_the_metadata_url_is_looked_for_in_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Option, then environment, then profile, then the default; a wrong one is not passed over."""
    settings = Settings()
    assert settings.metadata_url() == "torus://127.0.0.1:40000"
    assert settings.metadata_url("torus://x:1") == "torus://x:1"
    save_profiles(config_path(), {"default": {"metadata": "torus://p:1"}, "two": {}})
    assert settings.metadata_url("torus://x:1") == "torus://p:1"
    monkeypatch.setenv("TORUS_METADATA", "torus://e:1")
    assert settings.metadata_url() == "torus://e:1"
    settings.metadata = "torus://o:1"
    assert settings.metadata_url() == "torus://o:1"
    settings.metadata = None
    monkeypatch.setenv("TORUS_METADATA", "nonsense")
    with pytest.raises(Invalid, match="TORUS_METADATA"):
        settings.metadata_url()


def test_profiles_survive_a_round_trip_and_damage_is_told() -> None:
    """What is saved is loaded; what is no profile is refused with the file's name."""
    profiles = {"default": {"metadata": "torus://a:1", "secret-file": 'a "quoted" \\ path'}}
    save_profiles(config_path(), profiles)
    assert load_profiles(config_path()) == profiles
    odd = {"default": {"secret-file": "/etc/\N{KEY}/\x7f\t\n\u2028\xe9"}}
    save_profiles(config_path(), odd)
    assert load_profiles(config_path()) == odd
    with pytest.raises(Invalid, match="UTF-8"):
        save_profiles(config_path(), {"default": {"secret-file": "/etc/\udcff"}})
    assert load_profiles(config_path()) == odd
    nul = b'[default]\nsecret-file = "a\\u0000b"\n'
    large = b"#" * (CONFIG_BYTES_MAX + 1)
    odd_ones = (
        b"not toml",
        b"[default]\nother = 1\n",
        b"default = 3\n",
        b"\xff\xfe[\0",
        nul,
        large,
    )
    for damage in odd_ones:
        config_path().write_bytes(damage)
        with pytest.raises(Invalid, match=r"config\.toml"):
            load_profiles(config_path())


def test_changes_of_the_profile_wait_for_each_other() -> None:
    """None is lost, and none finds its file taken away."""

    def set_secret() -> None:
        arguments = ["config", "set", "secret-file", "/x"]
        assert CliRunner().invoke(ctl, arguments, obj=Settings()).exit_code == 0

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with changed_profiles(config_path()) as profiles:
            other = pool.submit(set_secret)
            assert concurrent.futures.wait([other], timeout=0.3).not_done
            profiles["default"] = {"metadata": "torus://a:1"}
        other.result()
    both = {"metadata": "torus://a:1", "secret-file": "/x"}
    assert load_profiles(config_path()) == {"default": both}


def test_the_profile_is_changed_by_command() -> None:
    """Set, show, unset; another profile by environment."""
    runner = CliRunner()

    def config(*arguments: str) -> str:
        result = runner.invoke(ctl, ["config", *arguments], obj=Settings())
        assert result.exit_code == 0, result.output
        return result.output

    config("set", "metadata", "torus://localhost:7")
    assert '"metadata": "torus://127.0.0.1:7"' in config("--json")
    assert "from profile" in config()
    config("set", "secret-file", "here")
    assert f'"secret_file": "{Path.cwd() / "here"}"' in config("--json")
    config("unset", "metadata")
    assert "from default" in config()
    for key, value in (("metadata", "x"), ("secret-file", "")):
        wrong = runner.invoke(ctl, ["config", "set", key, value], obj=Settings())
        assert wrong.exit_code == 2


def test_secrets_are_read_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """White space around a secret does not count; a short one is refused with advice."""
    path = tmp_path / "secret"
    path.write_text("0123456789abcdef\n")
    assert Settings().secret() is None
    assert Settings(secret_file=str(path)).secret() == b"0123456789abcdef"
    monkeypatch.setenv("TORUS_SECRET_FILE", str(path))
    assert Settings().secret() == b"0123456789abcdef"
    path.write_text("short\n")
    with pytest.raises(Invalid, match="openssl"):
        Settings().secret()
    os.truncate(path, 1 << 42)  # would find no room in memory
    with pytest.raises(Invalid, match="holds more than"):
        Settings().secret()


@pytest.mark.parametrize(
    ("mode", "told"), [(0o600, False), (0o640, False), (0o644, True), (0o602, True)]
)
def test_a_secret_that_everybody_can_use_is_told_once(
    mode: int, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line with what to do, and it is used all the same.

    Found by asking: nobody noticed. Containers have theirs like that, so it is no reason to stop.
    """
    path = tmp_path / "my secret"
    path.write_text("0123456789abcdef\n")
    path.chmod(mode)
    settings = Settings(secret_file=str(path))
    with click.Context(node, info_name="torus-node"):
        assert settings.secret() == settings.secret() == b"0123456789abcdef"
    line = (
        f"torus-node: warning: every user of this machine can use the secret in {path}: "
        f"chmod 600 '{path}'\n"
    )
    assert capsys.readouterr().err == (line if told else "")


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_key_that_everybody_can_use_is_told(
    mode: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same rule; a certificate is for everybody."""
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", lambda *_: None)
    for path in (key, cert):
        path.touch()
    cert.chmod(0o644)
    key.chmod(mode)
    _tls_context(cert, key)
    told = capsys.readouterr().err
    assert f"can use the private key in {key}: chmod 600 {key}\n" in told or mode == 0o600
    assert told.count("\n") == (mode == 0o644)


def test_files_that_are_no_certificates_are_told(tmp_path: Path) -> None:
    """In words: OpenSSL has none for it."""
    path = tmp_path / "secret"
    path.touch(0o600)
    path.write_text("0123456789abcdef")
    with pytest.raises(Invalid, match="for TLS: one of them is no PEM"):
        _tls_context(path, path)


def test_bad_usage_is_not_told_to_whoever_reads_the_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where standard error is closed, as by ``2>&-``."""
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as ended:
        run_main(ctl, "torusctl", ["nosuch"])
    assert ended.value.code == 2 and not capsys.readouterr().out


def test_a_secret_that_comes_through_a_pipe_is_not_everybodys(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As of ``--secret-file <(pass show torus)``."""
    read, write = os.pipe()
    os.fchmod(read, 0o666)
    os.write(write, b"0123456789abcdef\n")
    os.close(write)
    settings = Settings(secret_file=f"/dev/fd/{read}")
    # Some commands need it twice. Found by review: they failed when half was done.
    assert settings.secret() == settings.secret() == b"0123456789abcdef"
    os.close(read)
    assert capsys.readouterr().err == ""


# -- how commands end ------------------------------------------------------------------------------


def ending(
    capsys: pytest.CaptureFixture[str], body: Callable[[], Any], *arguments: str
) -> tuple[int, str]:
    """Exit status and standard error of a command with that body."""

    @click.command(cls=Command)
    def command() -> None:
        body()

    with pytest.raises(SystemExit) as ended:
        run_main(command, "prog", arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (NotExist("there is no volume x"), "prog: there is no volume x\n"),
        (Failed("two\nlines"), "prog: two lines\n"),
        (TorusError(), "prog: TorusError\n"),
        (OSError(errno.ENOENT, "No such file", "/x"), "prog: /x: No such file\n"),
        (PermissionError(errno.EACCES, "Permission denied"), "prog: Permission denied\n"),
        (KeyboardInterrupt(), "prog: interrupted\n"),
        (asyncio.CancelledError(), "prog: interrupted\n"),
    ],
)
def test_a_failure_is_one_plain_line_and_status_1(
    capsys: pytest.CaptureFixture[str], error: BaseException, told: str
) -> None:
    """No traceback, whatever it was that a user can run into."""

    def body() -> None:
        raise error

    assert ending(capsys, body) == (1, told)


def test_a_closed_standard_output_is_a_failure_of_what_only_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``>&-`` makes it; whoever does something else does it."""
    monkeypatch.setattr("sys.stdout", None)
    closed = (1, "prog: standard output is closed: nothing can be written to it\n")
    assert ending(capsys, lambda: print_table(("A",), [("b",)])) == closed
    assert ending(capsys, lambda: print_json([])) == closed
    assert ending(capsys, lambda: click.echo("done")) == (0, "")
    for command in ("version", "completion fish", "config"):
        with pytest.raises(SystemExit) as ended:
            run_main(ctl, "prog", command.split())
        assert (ended.value.code, capsys.readouterr().err) == closed


@pytest.mark.parametrize(("encoding", "text"), [("utf-8", "x\udcffy"), ("latin-1", "x\u6771y")])
def test_what_standard_output_cannot_encode_is_shown_all_the_same(
    monkeypatch: pytest.MonkeyPatch, encoding: str, text: str
) -> None:
    """The name of a directory is any bytes, and that of a zone may be in any language.

    Found by review: a dev cluster in such a directory was up, and ended in a traceback.
    """
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))

    @click.command()
    def command() -> None:
        click.echo(text)
        print_table(("ZONE",), [(text,)])

    with pytest.raises(SystemExit) as ended:
        run_main(command, "prog", [])
    shown = text.encode("ascii", "backslashreplace")
    assert ended.value.code == 0 and written.getvalue().count(shown) == 2


def test_what_standard_output_fails_with_is_told_as_its_error() -> None:
    """And not as one of the cluster, or of a file that has no name."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "torus_actors.cli.ctl", "completion", "bash"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    told = "torusctl: standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, told)


def test_bugs_are_not_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    """An error that nobody foresaw keeps its traceback."""

    def body() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ending(capsys, body)


def test_done_is_0_and_bad_usage_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    """And so is asking for help done."""
    assert ending(capsys, lambda: None) == (0, "")
    assert ending(capsys, lambda: None, "--help")[0] == 0
    status, told = ending(capsys, lambda: None, "--nonsense")
    assert status == 2 and "--nonsense" in told


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (ctl, ["volume", "create", "x", "1zz"]),
        (ctl, ["volume", "create", "x"]),
        (ctl, ["-C", "nonsense", "status"]),
        (ctl, ["status", "-C", "nonsense"]),
        (ctl, ["ring", "set-replication", "0"]),
        (ctl, ["ring", "manual-change"]),
        (ctl, ["peer", "add"]),
        (ctl, ["tree", "--watch", "--json"]),
        (ctl, ["completion", "tcsh"]),
        (ctl, ["debug", "rebalance", "--timeout", "nan"]),
        (ctl, ["block", "load", "x", "-", "--create"]),
        (node, ["start", "--size", "0%"]),
        (node, ["start", "--listen", "nowhere"]),
        (node, ["start", "--zone", "\udcff"]),
        (node, ["start", "--zone", "a\nb"]),
        (node, ["start", "--zone", "z" * 256]),
        (node, ["start", "--config", "/nonexistent"]),
        (node, ["start", "--config", "/dev/zero"]),
        (node, ["dev", "--volume", "demo"]),
        (node, ["dev", "--nodes", "0"]),
        (blk, ["serve", "demo"]),
        (blk, ["serve", "demo", "--unix", "/x", "--tls-required"]),
        (blk, ["serve", "demo", "--unix", "/x", "--wait-lock", "nan"]),
        (scenarios, ["explore", "--seeds", "0"]),
        (scenarios, ["run", "calm", "--seconds", "nan"]),
        (scenarios, ["run", "calm", "--seconds", "-1"]),
        (scenarios, ["real", "calm", "--seconds", "nan"]),
        (blk, ["serve", "demo", "--unix", "/x", "--default-export", "y"]),
        (blk, ["serve", "--unix", "/x", "--default-export", "no name"]),
        (blk, ["serve", "--unix", "/x", "--default-export", "demo@"]),
    ],
)
def test_bad_usage_is_found_before_anything_is_done(
    program: click.Group, arguments: list[str]
) -> None:
    """Status 2 and a hint."""
    result = CliRunner().invoke(program, arguments, obj=Settings())
    assert result.exit_code == 2, result.output


def every_command(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all commands and groups."""
    found = [path]
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += every_command(command, (*path, name))
        else:
            found.append((*path, name))
    return found


@pytest.mark.parametrize("program", [ctl, node, blk])
def test_every_command_takes_the_common_options_and_has_help(program: click.Group) -> None:
    """-C, --secret-file, -v and --log-level, at every level."""
    for path in every_command(program):
        result = CliRunner().invoke(program, [*path, "--help"], obj=Settings())
        assert result.exit_code == 0
        for option in ("--metadata", "--secret-file", "--verbose", "--log-level"):
            assert option in result.output, path


def test_the_last_metadata_option_wins() -> None:
    """Before the group, before the subcommand, behind it."""
    seen: list[str | None] = []

    @ctl.command("probe")
    @click.pass_obj
    def probe(settings: Settings) -> None:
        seen.append(settings.metadata)

    try:
        runner = CliRunner()
        runner.invoke(ctl, ["-C", "torus://a:1", "probe"], obj=Settings())
        runner.invoke(ctl, ["probe", "-C", "torus://b:1"], obj=Settings())
        runner.invoke(ctl, ["-C", "torus://a:1", "probe", "-C", "torus://b:1"], obj=Settings())
    finally:
        del ctl.commands["probe"]
    assert seen == ["torus://a:1", "torus://b:1", "torus://b:1"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completions_cover_all_programs(shell: str) -> None:
    """One script for the three commands."""
    result = CliRunner().invoke(ctl, ["completion", shell], obj=Settings())
    assert result.exit_code == 0
    for program in ("torusctl", "torus-node", "torusblk"):
        assert program in result.output


def test_version_is_told() -> None:
    """By the command and by the option."""
    from torus_actors import __version__

    for arguments in (["version"], ["version", "--json"], ["--version"]):
        assert __version__ in CliRunner().invoke(ctl, arguments, obj=Settings()).output


def test_errors_are_told_in_one_line() -> None:
    """Whatever their text is."""
    assert one_line(OSError("odd")) == "odd"
    assert one_line(RuntimeError(" a \n b ")) == "a b"


def test_a_snapshot_that_is_to_be_cloned_is_told_as_one() -> None:
    """With what can be done instead. Found by trying: it was told to be no name."""
    done = CliRunner().invoke(ctl, ["volume", "clone", "vm@monday", "new"], obj=Settings())
    assert isinstance(done.exception, Failed)
    assert "vm@monday is a snapshot" in str(done.exception)
    assert "torusctl block dump vm@monday FILE" in str(done.exception)


# -- nodes and stores ------------------------------------------------------------------------------


def test_nodes_are_named_by_the_beginning_of_their_ids() -> None:
    """One match is taken, none or several are refused."""
    ids = ["aab0", "aac0", "b000"]
    assert pick("b", ids, "node") == "b000"
    assert pick("AAB", ids, "node") == "aab0"
    with pytest.raises(NotExist, match="no node in the ring has an id that begins with zz: torus"):
        pick("zz", ids, "node in the ring")
    with pytest.raises(Invalid, match="2 ids"):
        pick("aa", ids, "node")
    with pytest.raises(Invalid, match="'' is no id"):
        pick("", ids, "node")
    assert short("@10.0.0.1:40000") == "@10.0.0.1:40000"


def test_an_address_is_free_where_a_server_could_listen() -> None:
    """Found by reading: a program on all IPv4 addresses kept a node from all IPv6 ones."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        check_free(("::", port), "--http")
        check_free(("127.0.0.1", 0), "--http")
        for host in ("0.0.0.0", "127.0.0.1"):
            with pytest.raises(Exists, match=r"in use; stop what listens there, or .* --http"):
                check_free((host, port), "--http")
    with pytest.raises(Exists, match=r"cannot listen on \[2001:db8::1\]:1: .*; choose another"):
        check_free(("2001:db8::1", 1), "--http")


def test_the_size_of_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes as given; a share counts what is stored already; the default leaves what is there.

    Found by reading: all of a disk left no room for a journal, nor for the second of the stores.
    """
    free = 100 * GIB
    monkeypatch.setattr(
        "torus_actors.cli.node.shutil.disk_usage", lambda path: type("", (), {"free": free})
    )
    directory = tmp_path / "not" / "yet"
    assert store_size(directory, 5 * GIB) == 5 * GIB
    assert store_size(directory, 0.5) == 50 * GIB
    assert store_size(directory, None) == SIZE_DEFAULT
    free = 5 * GIB
    assert store_size(directory, None) == 4 * GIB
    (directory / "blocks").mkdir(parents=True)
    (directory / "blocks" / "blocks.index").write_bytes(bytes(1 << 20))
    assert store_size(directory, None) is None
    whole = 5 * GIB + (1 << 20)
    assert store_size(directory, 1.0) == whole - whole // 50 - (64 << 20)
    free = (1 << 20) + 100
    with caplog.at_level(logging.INFO):
        assert store_size(directory, 0.01) is None  # never smaller by itself
    assert (
        "the stores have 1 MiB already, and are not made smaller for a share of 1%" in caplog.text
    )
    caplog.clear()
    (directory / "blocks" / "blocks.data").write_bytes(bytes(80 << 20))
    free = 81 << 20
    assert store_size(directory, 0.5) is None and not caplog.text  # it is what it was


def dev_config(directory: Path, **changes: Any) -> DevConfig:
    """Of a cluster of three."""
    fields: dict[str, Any] = {
        "directory": directory,
        "nodes": 3,
        "size_bytes": GIB,
        "volume": ("demo", GIB),
        "nbd": ("127.0.0.1", 10809),
        "unix_path": None,
        "replication": None,
        "port": 40000,
        "secret_file": None,
        "chatter": [],
    }
    return DevConfig(**{**fields, **changes})


def test_a_dev_cluster_is_not_started_with_fewer_nodes_than_it_has(tmp_path: Path) -> None:
    """Blocks would miss copies; the line says how many it has."""
    for index in range(4):
        (tmp_path / f"node-{index}").mkdir()
    with pytest.raises(Invalid, match="--nodes 4"):
        DevCluster(dev_config(tmp_path), Settings()).check()


def test_a_dev_cluster_serves_no_strangers(tmp_path: Path) -> None:
    """Told before anything is made, with something that can be done."""
    config = dev_config(tmp_path / "new", nbd=("0.0.0.0", 10809))
    with pytest.raises(Invalid, match=r"give --nbd 127\.0\.0\.1:PORT"):
        DevCluster(config, Settings()).check()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"volume": ("a b", GIB)}, "'a b' is no name"),
        ({"unix_path": Path("/nonexistent/socket")}, "there is no directory /nonexistent"),
    ],
)
def test_a_dev_cluster_that_cannot_serve_is_not_made(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    """Found by trying: all its nodes had been made, with their disks, when it said so."""
    with pytest.raises(Invalid, match=told):
        DevCluster(dev_config(tmp_path / "new", **changes), Settings()).check()


@pytest.mark.parametrize("place", ["new", "."])
def test_a_dev_cluster_may_have_its_socket_where_it_makes_a_directory(
    place: str, tmp_path: Path
) -> None:
    """Found by review: --unix below --dir was refused at the first start only."""
    unix = tmp_path / "not/there" / place / "socket"
    port = free_ports(5)
    nbd = "127.0.0.1", port + 4
    config = dev_config(tmp_path / "not/there/new", unix_path=unix, port=port, nbd=nbd)
    DevCluster(config, Settings()).check()


@pytest.mark.parametrize(
    ("command", "arguments"),
    [(blk, ["serve", "v", "--unix", ""]), (node, ["dev", "--unix", ""])],
)
def test_a_socket_without_a_name_is_bad_usage(command: click.Command, arguments: list[str]) -> None:
    """It is not the working directory."""
    done = CliRunner().invoke(command, arguments, obj=Settings())
    assert done.exit_code == 2 and "it is empty: name a socket" in done.output


def test_a_dev_cluster_does_not_stand_in_its_own_way(tmp_path: Path) -> None:
    """The address for NBD may be none of those of its nodes."""
    config = dev_config(tmp_path / "new", nodes=3, nbd=("127.0.0.1", 40003))
    with pytest.raises(Invalid, match="40000 to 40003"):
        DevCluster(config, Settings()).check()


@virtual
async def test_a_dev_cluster_whose_first_start_was_cut_off_has_its_copies() -> None:
    """Its directories are there; until it had its first volume, copies are as many as by default.

    Afterwards they are what somebody made of them.
    """
    meta = MetadataService(MemoryStore(), rng=random.Random(1))
    peers = [Peer(str(uuid.UUID(int=n)), 1 << 20, "", f"127.0.0.1:{n}") for n in (1, 2, 3)]
    gmd = GlobalMetadata(1 << 14, "crc,base", 1, str(uuid.UUID(int=9)))
    await meta.init(gmd, rings.marshal(rings.make_ring("ketama", peers, version=1, replication=1)))
    for peer in peers:
        await meta.register_peer(PeerInfo(peer.peer_id, peer.address), await meta.grant_lease(60))

    class Connected:
        def __init__(self) -> None:
            self.meta = meta

        async def cluster(self) -> tuple[GlobalMetadata, rings.Ring]:
            return gmd, rings.unmarshal((await meta.ring())[0])

    connection: Any = Connected()
    cluster = DevCluster(dev_config(Path("dev")), Settings())
    for copies in (2, 1):
        await cluster._prepare(connection)
        assert cluster.replication == copies
        await meta.delete_volume("demo")
        ring = (await connection.cluster())[1].with_replication(1)
        await meta.set_ring(rings.marshal(ring), ring.version)
    await meta.close()


def test_the_banner_of_a_dev_cluster_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """URIs of both kinds, commands with the metadata URL where it is not the default."""
    unix = tmp_path / "a b.sock"
    cluster = DevCluster(dev_config(tmp_path, port=41000, unix_path=unix), Settings())
    cluster.replication = 2
    banner = cluster.banner()
    assert "nbd://127.0.0.1:10809/demo" in banner
    assert f"nbd+unix:///demo?socket={str(unix).replace(' ', '%20')}" in banner
    assert "torusctl -C torus://127.0.0.1:41000 status" in banner
    no_text = DevCluster(dev_config(tmp_path, unix_path=Path("/\udcff")), Settings())
    no_text.replication = 2
    assert "nbd+unix:///demo?socket=/%FF\n" in no_text.banner()
    cluster = DevCluster(dev_config(tmp_path), Settings())
    cluster.replication = 2
    assert "torusctl status" in cluster.banner()
    # Found by review: what was pasted asked another cluster, or was not let in.
    monkeypatch.setenv("TORUS_METADATA", "etcd://10.0.0.1:2379")
    assert "torusctl -C torus://127.0.0.1:40000 status" in cluster.banner()
    cluster = DevCluster(dev_config(tmp_path, port=41000, secret_file="my secret"), Settings())
    cluster.replication = 2
    shown = "torusctl -C torus://127.0.0.1:41000 --secret-file 'my secret' status"
    assert shown in cluster.banner()


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), (" 2 d", 172800), ("45", 45)]
)
def test_times_are_read_as_people_write_them(text: str, seconds: float) -> None:
    """Seconds, minutes, hours, days; without a unit they are seconds."""
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "0m", "-5s", "5 weeks", "ten", "1h30m", "20\u017f", "9" * 310]
)
def test_what_is_no_time_is_refused(text: str) -> None:
    """With a text that says how to write one."""
    with pytest.raises(ValueError, match="10m"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("given", "told"), [("5s", "at least 10 s"), ("soon", "or never"), ("-1", "or never")]
)
def test_remove_after_is_checked(given: str, told: str) -> None:
    """Too short a time, or none, is bad usage."""
    from click.testing import CliRunner

    from torus_actors.cli.node import cli

    done = CliRunner().invoke(cli, ["start", f"--remove-after={given}"])
    assert done.exit_code == 2 and told in done.output


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("auto-join = 3", "'3' is not a valid boolean"),
        ('auto-join = "perhaps"', "'perhaps' is not a valid boolean"),
        ("lease = true", "'True' is not a valid integer"),
        ('data-dir = ""\nlisten = "nowhere"', "name a directory"),
        ("zone = 1.5", "must be text, a whole number"),
        ('zone = "a\\u0000b"', "NUL in zone"),
        ("colour = 1", "there is no option colour"),
    ],
)
def test_what_a_file_of_options_says_is_checked(tmp_path: Path, line: str, told: str) -> None:
    """Like what is said on the command line: what is no such value is bad usage."""
    file = tmp_path / "node.toml"
    file.write_text(f"{line}\n")
    done = CliRunner().invoke(node, ["start", "--config", str(file)])
    assert done.exit_code == 2 and told in done.output, done.exception


def test_a_home_directory_that_nobody_knows_is_told_in_one_line() -> None:
    """Of a user who does not exist; also as the file with the secret."""
    for command in (
        ["start", "--data-dir", "~nosuchuser/x"],
        ["--secret-file", "~nosuchuser/x", "start", "--data-dir", "/nonexistent/x"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "torus_actors.cli.node", *command],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done
        assert "no such home directory" in done.stderr


@pytest.mark.parametrize("options", [[], ["--advertise", "0.0.0.0:40000"]])
def test_no_node_tells_others_an_address_that_is_none(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    tmp_path: Path,
) -> None:
    """Each of them would find itself there."""
    monkeypatch.setattr("torus_actors.cli.daemon.run_daemon", lambda settings, work: work.close())
    command = ["start", "--data-dir", str(tmp_path / "node"), "--insecure", "--listen"]
    with pytest.raises(SystemExit) as ended:
        run_main(node, "torus-node", [*command, "0.0.0.0:40000", *options])
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert "give --advertise HOST:PORT" in told and told.count("\n") == 1
