"""`sidecar dead-letters …`: what can be typed."""
# ruff: noqa: PLC0415 - each command loads what it needs

from typing import Annotated, Final

import typer

from sidecar.cli import exits
from sidecar.cli.options import Address, Debug, Socket

_WHICH: Final = "Which ones"

dead_letters = typer.Typer(
    name="dead-letters",
    help="Look at events that could not be delivered; redrive or discard them.",
    no_args_is_help=True,
)

Subscription = Annotated[
    str,
    typer.Option(
        "--subscription",
        "-s",
        metavar="NAME",
        help="Of this subscription; default: of all that the sidecar has.",
        show_default=False,
        rich_help_panel=_WHICH,
    ),
]
Reason = Annotated[
    list[str] | None,
    typer.Option(
        "--reason",
        help="attempts_exhausted, rejected, lease_expired, app_crash, expired or undecodable; "
        "repeat it for several.",
        show_default=False,
        rich_help_panel=_WHICH,
    ),
]
Since = Annotated[
    str,
    typer.Option(
        "--since",
        metavar="TIME",
        help='Stored since: "2h" ago (s, m, h, d, w), or a time as 2026-01-31T12:00:00Z.',
        show_default=False,
        rich_help_panel=_WHICH,
    ),
]
Until = Annotated[
    str,
    typer.Option(
        "--until",
        metavar="TIME",
        help="Stored before; as --since.",
        show_default=False,
        rich_help_panel=_WHICH,
    ),
]
Type = Annotated[
    str,
    typer.Option(
        "--type",
        help='The event\'s type; wildcards as in topics: "order.*".',
        show_default=False,
        rich_help_panel=_WHICH,
    ),
]
Key = Annotated[
    str,
    typer.Option("--key", help="The event's key.", show_default=False, rich_help_panel=_WHICH),
]
Error = Annotated[
    str,
    typer.Option(
        "--error",
        metavar="TEXT",
        help="The error has this text.",
        show_default=False,
        rich_help_panel=_WHICH,
    ),
]
Topic = Annotated[
    str,
    typer.Option(
        "--topic",
        help="Where the event came from; wildcards allowed.",
        show_default=False,
        rich_help_panel=_WHICH,
    ),
]
In = Annotated[
    str,
    typer.Option(
        "--in",
        metavar="BROKER/TOPIC",
        help="Look at this topic, instead of where the subscriptions' dead letters go.",
        show_default=False,
        rich_help_panel=_WHICH,
    ),
]
Ids = Annotated[
    list[str] | None,
    typer.Argument(metavar="[ID]...", help="Just these, as `list` shows them.", show_default=False),
]
All = Annotated[
    bool, typer.Option("--all", help="Every one of them; needed where nothing else says which.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only count.")]
Limit = Annotated[
    int | None, typer.Option("--limit", "-n", min=1, help="At most so many.", show_default=False)
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@dead_letters.command("list")
def list_(
    *,
    subscription: Subscription = "",
    reason: Reason = None,
    since: Since = "",
    until: Until = "",
    type_: Type = "",
    key: Key = "",
    error: Error = "",
    topic: Topic = "",
    place: In = "",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many.")] = 50,
    oldest_first: Annotated[
        bool, typer.Option("--oldest-first", help="Default: newest first.")
    ] = False,
    all_states: Annotated[
        bool,
        typer.Option(
            "--all-states", help="Also what was redriven or discarded, where the broker keeps it."
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="A line of JSON each.")] = False,
    socket: Socket = None,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """
    List dead letters, newest first.

    Examples:
      sidecar dead-letters list
      sidecar dead-letters list -s billing --since 2h --error timeout
      sidecar dead-letters list --type 'order.*' --json | jq -r .id

    Exit status: 0 listed, also when there are none; 1 the sidecar said no.
    """
    from sidecar.cli import dead_letters as work
    from sidecar.cli.calling import target_of

    wanted = work.filter_of(
        subscription=subscription,
        reasons=reason or [],
        since=since,
        until=until,
        event_type=type_,
        key=key,
        error=error,
        topic=topic,
        place=place,
    )
    target = target_of(socket, address)
    exits.leave(
        lambda: work.list_(
            target,
            wanted,
            limit=limit,
            oldest_first=oldest_first,
            all_states=all_states,
            as_json=json,
        ),
        debug=debug,
    )


@dead_letters.command()
def show(
    *,
    id_: Annotated[str, typer.Argument(metavar="ID", help="As `list` shows it.")],
    json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
    socket: Socket = None,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """
    Show one dead letter, with its event and the event's data.

    Example:
      sidecar dead-letters show events/dlq.orders.created/17~0a1b2c3d

    Exit status: 0 shown, 1 there is none, or the sidecar said no.
    """
    from sidecar.cli import dead_letters as work
    from sidecar.cli.calling import target_of

    target = target_of(socket, address)
    exits.leave(lambda: work.show(target, id_, as_json=json), debug=debug)


@dead_letters.command()
def redrive(
    *,
    ids: Ids = None,
    subscription: Subscription = "",
    reason: Reason = None,
    since: Since = "",
    until: Until = "",
    type_: Type = "",
    key: Key = "",
    error: Error = "",
    topic: Topic = "",
    place: In = "",
    all_: All = False,
    rate: Annotated[
        float, typer.Option("--rate", min=0.001, help="At most so many a second.")
    ] = 100.0,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="[BROKER/]TOPIC",
            help='Instead of where each came from; "{topic}" stands for that.',
            show_default=False,
        ),
    ] = "",
    dry_run: DryRun = False,
    limit: Limit = None,
    yes: Yes = False,
    socket: Socket = None,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """
    Publish dead letters again, to where they came from, oldest first.

    Each once, however often it is called: stopped half-way, by Ctrl-C or
    because the sidecar died, it goes on when it is called again. On a
    terminal it says how many, and asks.

    Examples:
      sidecar dead-letters redrive -s billing --error timeout --rate 50
      sidecar dead-letters redrive --all --dry-run
      sidecar dead-letters redrive events/dlq.orders.created/17~0a1b2c3d

    Exit status: 0 all done, 1 not all, 130 interrupted.
    """
    from sidecar.cli import dead_letters as work
    from sidecar.cli.calling import target_of

    wanted = work.filter_of(
        ids=ids or [],
        subscription=subscription,
        reasons=reason or [],
        since=since,
        until=until,
        event_type=type_,
        key=key,
        error=error,
        topic=topic,
        place=place,
    )
    job = work.redrive_of(
        wanted,
        target=target_of(socket, address),
        all_=all_,
        rate=rate,
        to=to,
        dry_run=dry_run,
        limit=limit,
        yes=yes,
    )
    exits.leave(lambda: work.redrive(job), debug=debug)


@dead_letters.command()
def discard(
    *,
    ids: Ids = None,
    subscription: Subscription = "",
    reason: Reason = None,
    since: Since = "",
    until: Until = "",
    type_: Type = "",
    key: Key = "",
    error: Error = "",
    topic: Topic = "",
    place: In = "",
    all_: All = False,
    dry_run: DryRun = False,
    limit: Limit = None,
    yes: Yes = False,
    socket: Socket = None,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """
    Give dead letters up for good.

    It says how many, and asks; where nobody can be asked, --yes is needed.

    Examples:
      sidecar dead-letters discard --reason expired --until 7d
      sidecar dead-letters discard events/dlq.orders.created/17~0a1b2c3d --yes

    Exit status: 0 all done, 1 not all, 130 interrupted.
    """
    from sidecar.cli import dead_letters as work
    from sidecar.cli.calling import target_of

    wanted = work.filter_of(
        ids=ids or [],
        subscription=subscription,
        reasons=reason or [],
        since=since,
        until=until,
        event_type=type_,
        key=key,
        error=error,
        topic=topic,
        place=place,
    )
    job = work.discard_of(
        wanted, target=target_of(socket, address), all_=all_, dry_run=dry_run, limit=limit, yes=yes
    )
    exits.leave(lambda: work.redrive(job), debug=debug)
