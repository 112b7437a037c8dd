"""``torusctl config``, ``completion`` and ``version``: about the commands themselves."""

from __future__ import annotations

import os

import click

from torus_actors import __version__
from torus_actors.cli.common import (
    METADATA_ENV,
    SECRET_ENV,
    Command,
    Group,
    Settings,
    json_option,
    parse_metadata_url,
)
from torus_actors.cli.output import open_stdout, print_json
from torus_actors.cli.profile import (
    KEYS,
    changed_profiles,
    config_path,
    expanded,
    load_profiles,
    profile_name,
)

PROGRAMS = {
    "torusctl": "torus_actors.cli.ctl",
    "torus-node": "torus_actors.cli.node",
    "torusblk": "torus_actors.cli.blk",
}


@click.command(cls=Command)
@json_option
def version(as_json: bool) -> None:
    """Print the version."""
    if as_json:
        print_json({"version": __version__})
    else:
        click.echo(f"torus-actors {__version__}", open_stdout())


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print completions for all three commands: eval "$(torusctl completion bash)"."""
    from importlib import import_module

    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    for program, module in PROGRAMS.items():
        variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
        click.echo(kind(import_module(module).cli, {}, program, variable).source(), open_stdout())


@click.group(cls=Group, invoke_without_command=True)
@json_option
@click.pass_context
def config(ctx: click.Context, as_json: bool) -> None:
    """Show which cluster is used and why; set and unset change the profile."""
    if ctx.invoked_subcommand is not None:
        return
    settings = ctx.ensure_object(Settings)
    profile = load_profiles(config_path()).get(profile_name(), {})
    if settings.metadata is not None:
        source = "option"
    elif os.environ.get(METADATA_ENV):
        source = f"${METADATA_ENV}"
    else:
        source = "profile" if "metadata" in profile else "default"
    secret = settings.secret_file or os.environ.get(SECRET_ENV) or profile.get("secret-file")
    shown = {
        "file": str(config_path()),
        "profile": profile_name(),
        "metadata": settings.metadata_url(),
        "metadata_from": source,
        "secret_file": secret,
    }
    if as_json:
        print_json(shown)
        return
    out = open_stdout()
    click.echo(f"file         {shown['file']}", out)
    click.echo(f"profile      {shown['profile']}", out)
    click.echo(f"metadata     {shown['metadata']} (from {source})", out)
    click.echo(f"secret file  {secret or 'none'}", out)


@config.command("set")
@click.argument("key", type=click.Choice(KEYS))
@click.argument("value")
def config_set(key: str, value: str) -> None:
    """Set KEY in the profile ($TORUS_PROFILE, or "default")."""
    if key == "metadata":
        try:
            value = parse_metadata_url(value)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
    elif not value:
        raise click.UsageError("no file has an empty name: to use none, unset secret-file")
    else:
        value = str(expanded(value))  # the same file, wherever a command is run
    with changed_profiles(config_path()) as profiles:
        profiles.setdefault(profile_name(), {})[key] = value


@config.command("unset")
@click.argument("key", type=click.Choice(KEYS))
def config_unset(key: str) -> None:
    """Remove KEY from the profile."""
    with changed_profiles(config_path()) as profiles:
        profiles.get(profile_name(), {}).pop(key, None)
