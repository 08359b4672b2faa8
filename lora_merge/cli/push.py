"""`lora-merge push`: publish an adapter folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_merge.cli.output import DebugOption, JsonOption, Output, QuietOption, plain
from lora_merge.cli.waiting import MaxWaitOption
from lora_merge.errors import LoraMergeError, UsageError
from lora_merge.hub.waiting import MAX_WAIT, waiting_at_most

if TYPE_CHECKING:
    from lora_merge.publish.push import Pushed
    from lora_merge.publish.repository import Target

RepoArgument = Annotated[str, typer.Argument(metavar="REPO", help="The repository: ORG/NAME.")]
PushOption = Annotated[
    str | None, typer.Option("--push", metavar="REPO", help="Publish the result to this repository of the Hub.")
]
PrivateOption = Annotated[
    bool | None,
    typer.Option("--private/--public", help="Who may see the repository if it is made now.  [default: private]"),
]
CreatePrOption = Annotated[
    bool, typer.Option("--create-pr", help="Propose it as a pull request, in somebody else's repository.")
]


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The adapter folder.")],
    repo: RepoArgument,
    private: PrivateOption = None,
    create_pr: CreatePrOption = False,
    revision: Annotated[str, typer.Option(help="The branch.")] = "main",
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="What `lora-merge evaluate --json` printed: its results go into the card.")
    ] = None,
    max_wait: MaxWaitOption = MAX_WAIT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Publish an adapter folder: one commit of the files that belong to it, scanned first for secrets and paths.

    Example: lora-merge push global org/global --public
    """
    out = Output(as_json, quiet, debug)
    with out.reporting(resume="The same command goes on; it sees what has been published."), waiting_at_most(max_wait):
        target = target_of(repo, private, create_pr, revision)
        pushed = publish(out, folder, target, message=message, evaluation=evaluation, max_wait=max_wait)
        out.result(record_of(pushed), made=pushed.published.commit, show=lambda: plain(summary_of(pushed)))


def target_of(repo: str, private: bool | None, create_pr: bool, revision: str = "main") -> "Target":
    """Where to publish, from the options."""
    from lora_merge.publish.repository import Target

    return Target(repo, revision, private, create_pr)


def publish(
    out: Output,
    folder: Path,
    target: "Target",
    *,
    message: str | None = None,
    evaluation: Path | None = None,
    max_wait: float = MAX_WAIT,
) -> "Pushed":
    """Push, with the library's bars where results are for people, and say what was left out."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # documented there

    from lora_merge.publish.push import push as run

    if out.quiet or out.as_json:
        disable_progress_bars()
    pushed = run(folder, target, message=message, evaluation=evaluation, max_wait=max_wait, tell=out.say)
    for warning in pushed.warnings:
        out.warn(warning)
    if pushed.left_out:
        out.say(f"Left out: {', '.join(pushed.left_out)}")
    return pushed


def record_of(pushed: "Pushed") -> dict[str, Any]:
    """What ``--json`` prints of a push."""
    published = pushed.published
    return {
        "repo": published.repo,
        "commit": published.commit,
        "url": published.url,
        "private": published.private,
        "pull_request": published.pull_request,
        "superseded": published.superseded,
        "files": list(pushed.files),
        "changed": list(published.changed),
        "removed": list(published.removed),
        "left_out": list(pushed.left_out),
        "warnings": list(pushed.warnings),
    }


def summary_of(pushed: "Pushed") -> str:
    """What a push did, in a line or two."""
    published = pushed.published
    seen = "private" if published.private else "public"
    if published.pull_request and published.changed:
        return f"{published.repo}: proposed as {published.pull_request}, commit {published.commit}"
    if published.pull_request:
        return f"{published.repo}: nothing to change; proposed already as {published.pull_request}"
    if not published.changed and not published.removed:
        return f"{published.repo}: nothing to change; all of it is there, at commit {published.commit} ({seen})"
    names = ", ".join(published.changed) + (f"; removed {', '.join(published.removed)}" * bool(published.removed))
    later = "\nSomebody has published something else there since." * published.superseded
    return f"{published.repo} ({seen}): {names}\ncommit {published.commit}\n{published.url}{later}"


def may_publish(
    out: Output, repo: str | None, private: bool | None, create_pr: bool, max_wait: float
) -> "Target | None":
    """Where ``--push`` publishes, once it is known that this will be allowed; None where nothing is to be published."""
    if repo is None:
        if private is not None or create_pr:
            raise UsageError("--private, --public and --create-pr are of --push.", hint="Add --push ORG/NAME.")
        return None
    from lora_merge.publish.push import require_access

    target = target_of(repo, private, create_pr)
    require_access(target, max_wait=max_wait, tell=out.say)
    return target


def publish_result(out: Output, folder: Path, target: "Target | None", max_wait: float) -> "Pushed | None":
    """Publish what a command has made. Where that fails, say that it was made, and how to publish it."""
    if target is None:
        return None
    try:
        return publish(out, folder, target, max_wait=max_wait)
    except LoraMergeError as error:
        seen = {None: "", True: " --private", False: " --public"}[target.private] + " --create-pr" * target.create_pr
        again = f"{folder} is made. To publish it: lora-merge push {folder} {target.repo}{seen}"
        error.hint = f"{error.hint} {again}".strip()
        raise


def push_record(pushed: "Pushed | None") -> dict[str, Any]:
    """The entry of a command's ``--json`` about its ``--push``."""
    return {"published": record_of(pushed)} if pushed else {}


def push_summary(pushed: "Pushed | None") -> str:
    """The lines of a command's result about its ``--push``."""
    return f"\n{summary_of(pushed)}" if pushed else ""
