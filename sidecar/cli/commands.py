"""
The command line: what can be typed.

The work of a command is in a module of its own, which is loaded when the command runs: `sidecar run`
loads nothing of the clients, and the clients nothing of the daemon.
"""
# ruff: noqa: PLC0415 - each command loads what it needs

from pathlib import Path
from typing import Annotated, Final

import typer

from sidecar.cli import exits
from sidecar.cli.dead_letter_commands import dead_letters
from sidecar.cli.options import Address, Debug, Socket

_CLIENT: Final = "Talk to a sidecar that runs"

app = typer.Typer(
    name="sidecar",
    help="Publish and consume events over NATS and JetStream from any language.",
    epilog="Start with: sidecar run, and in another terminal: "
    "sidecar publish orders.created '{\"order\": 1}'",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        envvar="SIDECAR_CONFIG",
        help="The configuration, a TOML file. Without one: the embedded NATS server.",
        show_default=False,
    ),
]

app.add_typer(dead_letters, rich_help_panel=_CLIENT)


@app.command()
def run(*, config: Config = None, debug: Debug = False) -> None:
    """
    Run the sidecar.

    SIGTERM or Ctrl-C stops it in order; a second one ends it at once.

    Example:
      sidecar run --config sidecar.toml

    Exit status: 0 stopped in order, 70 internal error,
    78 the configuration is wrong or cannot be used here.
    """
    from sidecar.cli.run import run as work

    exits.leave(lambda: work(config, debug=debug), debug=debug)


@app.command()
def check(
    *,
    config: Config = None,
    connect: Annotated[bool, typer.Option("--connect", help="Also try the brokers.")] = False,
    debug: Debug = False,
) -> None:
    """
    Check a configuration: what it means, or all that is wrong with it.

    Example:
      sidecar check --config sidecar.toml --connect

    Exit status: 0 good, 78 wrong, 1 a broker does not answer (with --connect).
    """
    from sidecar.cli.check import check as work

    exits.leave(lambda: work(config, connect=connect), debug=debug)


@app.command(rich_help_panel=_CLIENT)
def publish(
    *,
    topic: Annotated[str, typer.Argument(help='Where to, as "orders.created".')],
    data: Annotated[
        str | None,
        typer.Argument(help='The data of one event; "-" reads lines from standard input.'),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("--file", "-f", help="Publish the lines of a file: CloudEvents as JSON."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="A line is the data of an event, not an event.")
    ] = False,
    no_data: Annotated[
        bool, typer.Option("--no-data", help="One event without data (a tombstone on Kafka).")
    ] = False,
    type_: Annotated[
        str,
        typer.Option(
            "--type",
            help="What happened.",
            show_default="the topic, or what the configuration says for it",
        ),
    ] = "",
    source: Annotated[str, typer.Option(help="Who says so.", show_default="the app's name")] = "",
    id_: Annotated[
        str, typer.Option("--id", help="The event's id.", show_default="a new one")
    ] = "",
    key: Annotated[str, typer.Option(help="Events of one key stay in order.")] = "",
    subject: Annotated[str, typer.Option(help="What it is about.")] = "",
    content_type: Annotated[
        str, typer.Option(help="Media type of the data.", show_default="JSON if it is, else text")
    ] = "",
    extension: Annotated[
        list[str] | None, typer.Option("--extension", "-e", metavar="NAME=VALUE")
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option("--header", "-H", metavar="NAME=VALUE")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=10_000, help="Events in one request.")] = 100,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the summary.")] = False,
    socket: Socket = None,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """
    Publish one event, or the lines of a file or of standard input.

    Receipts go to standard output, a line of JSON each; failures and the
    summary to standard error. What the options say holds for every line
    that does not say otherwise.

    Examples:
      sidecar publish orders.created '{"order": 1}' --key customer-7
      sidecar publish orders.created --file events.jsonl --quiet
      tail -f app.log | sidecar publish logs.app --raw -

    Exit status: 0 all published, 1 not all, 130 interrupted.
    """
    from sidecar.cli import publish as work
    from sidecar.cli.calling import target_of

    job = work.job_of(
        target=target_of(socket, address),
        topic=topic,
        data=data,
        file=file,
        raw=raw,
        no_data=no_data,
        template=work.template_of(
            type=type_,
            source=source,
            id=id_,
            key=key,
            subject=subject,
            content_type=content_type,
            extensions=extension or [],
            headers=header or [],
        ),
        batch=batch,
        quiet=quiet,
    )
    exits.leave(lambda: work.publish(job), debug=debug)


@app.command(rich_help_panel=_CLIENT)
def subscribe(
    *,
    subscription: Annotated[
        str,
        typer.Argument(
            metavar="NAME_OR_TOPIC", help="A subscription's name; with --name a topic or pattern."
        ),
    ],
    name: Annotated[
        str, typer.Option(help="Describe the subscription here, under this name.")
    ] = "",
    start: Annotated[
        str,
        typer.Option(
            help="With --name: where a new one starts: earliest, latest, or a time.",
            show_default="earliest",
        ),
    ] = "",
    broker: Annotated[
        str, typer.Option(help="With --name: the broker.", show_default="the topic's route")
    ] = "",
    filter: Annotated[  # noqa: A002 - the option's name
        list[str] | None,
        typer.Option(
            metavar="ATTRIBUTE=VALUE",
            help='With --name: only events with this, or with a value that begins so: "type=order.*".',
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="End after so many events.")
    ] = None,
    no_ack: Annotated[
        bool, typer.Option("--no-ack", help="Only look: what was shown is released at the end.")
    ] = False,
    socket: Socket = None,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """
    Print the events of a subscription, and ack each when it is printed.

    A line of JSON has the event (as CloudEvents JSON) under "event", beside
    its topic, attempt, token, position and headers. It ends at Ctrl-C,
    after --count, or when nobody reads any more.

    Examples:
      sidecar subscribe billing
      sidecar subscribe 'orders.>' --name debugging --start latest
      sidecar subscribe billing --count 10 --no-ack | jq .event.data

    Exit status: 0 ended so, 1 the sidecar said no.
    """
    from sidecar.cli import subscribe as work
    from sidecar.cli.calling import target_of

    job = work.job_of(
        target=target_of(socket, address),
        subscription=subscription,
        name=name,
        start=start,
        broker=broker,
        filters=filter or (),
        count=count,
        ack=not no_ack,
    )
    exits.leave(lambda: work.subscribe(job), debug=debug)


@app.command(rich_help_panel=_CLIENT)
def status(
    *,
    json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
    socket: Socket = None,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """
    Show what a sidecar is connected to, its routes and subscriptions.

    Example:
      sidecar status --json | jq .subscriptions

    Exit status: 0 ready, 1 not ready or not reachable.
    """
    from sidecar.cli.calling import target_of
    from sidecar.cli.status import status as work

    target = target_of(socket, address)
    exits.leave(lambda: work(target, as_json=json), debug=debug)


@app.command()
def version() -> None:
    """Print the version."""
    from sidecar import __version__

    typer.echo(f"sidecar {__version__}")
