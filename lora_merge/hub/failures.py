"""What huggingface_hub, httpx2 and hf_xet raise, as our errors: one sentence, the exit code, the next command."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import errors as hub
from huggingface_hub import get_token

from lora_merge.errors import (
    ConflictError,
    LoraMergeError,
    NetworkError,
    NotFoundError,
    StorageError,
    UsageError,
    one_line,
)
from lora_merge.hub.session import endpoint

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.EISDIR}
# hf_xet, written in Rust, says an error number only inside a RuntimeError's text.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def asking(repo: str) -> Iterator[None]:
    """Around calls to the Hub about `repo` (or whatever name tells the user where): failures become ours.

    Raises:
        NotFoundError: not there, gated, private, or the token is missing, wrong or may only read.
        NetworkError: the Hub cannot be reached, is busy, or sends what is not an answer.
        ConflictError: the repository has moved, or exists already.
        StorageError: the local disk failed.
        UsageError: `repo` cannot be a repository's name.
    """
    try:
        yield
    except LoraMergeError:
        raise
    except Exception as error:  # keep the block small: what is wrong in an answer shows as KeyError or TypeError
        raise translated(error, repo) from error


def translated(error: Exception, repo: str) -> LoraMergeError:
    """`error`, raised by a call about `repo`, as one of ours."""
    if isinstance(error, hub.HfHubHTTPError):
        return _from_answer(error, repo)
    if isinstance(cause := error.__cause__, hub.HfHubHTTPError):
        return _from_answer(cause, repo)  # the library wraps it where it looked into the cache in between
    if isinstance(error, hub.LocalEntryNotFoundError) and isinstance(cause, Exception):
        return translated(cause, repo)
    if isinstance(error, hub.OfflineModeIsEnabled):
        return NetworkError(f"{repo} is on the Hub, and HF_HUB_OFFLINE is set.", hint="unset HF_HUB_OFFLINE")
    if isinstance(error, hub.HFValidationError):
        return UsageError(
            f"{one_line(repo)} is not a repository's name: ORG/NAME of letters, digits, '.', '_' and '-'."
        )
    if isinstance(error, hub.LocalTokenNotFoundError):
        return NotFoundError(f"{repo} needs a token of the Hub, and there is none here.", hint="hf auth login")
    if (number := _errno(error)) in _DISK:
        return StorageError(f"{repo} cannot be stored: {os.strerror(number)}.")
    hint = "Run the same command again."
    return NetworkError(f"{repo}: the Hub at {endpoint()} failed: {_brief(error)}.", hint=hint)


def _from_answer(error: hub.HfHubHTTPError, repo: str) -> LoraMergeError:
    status = error.response.status_code
    said = one_line(error.server_message or "")[:200]
    if isinstance(error, hub.GatedRepoError):
        hint = f"Ask for access at {endpoint()}/{repo}, then: hf auth login"
        return NotFoundError(f"{repo} is gated, and you have not been given access to it.", hint=hint)
    if isinstance(error, hub.DisabledRepoError):
        return NotFoundError(f"{repo} has been disabled by the Hub.")
    if isinstance(error, hub.RevisionNotFoundError):
        return NotFoundError(f"{repo} has no such revision.", hint=f"See {endpoint()}/{repo}/commits/main")
    if isinstance(error, hub.RemoteEntryNotFoundError):
        return NotFoundError(f"{repo} has no such file.", hint=f"See {endpoint()}/{repo}/tree/main")
    if status == 401 and re.search("[Ii]nvalid (credentials|user token)", str(error)):  # the latter of whoami alone
        return NotFoundError("The Hub does not know your token: it is wrong or has expired.", hint="hf auth login")
    if isinstance(error, hub.RepositoryNotFoundError) or status in (401, 404):
        return NotFoundError(
            f"There is no {repo} on the Hub, or it is private and you may not read it.", hint=sign_in()
        )
    if status == 403:
        return NotFoundError(f"{repo}: your token may not do this. {said}".strip(), hint=write_token())
    if status in (409, 412):
        return ConflictError(f"{repo} was changed by somebody else, or exists already. {said}".strip())
    if status == 400:
        return UsageError(f"{repo}: the Hub does not accept this: {said or status}")
    return NetworkError(f"{repo}: the Hub answers {status}. {said}".strip(), hint="Try again later.")


def sign_in() -> str:
    """The next command of somebody who may not see a repository."""
    return "hf auth whoami  (whose token is used?)" if get_token() else "hf auth login"


def write_token() -> str:
    """The next command of somebody whose token may only read."""
    return f"Make a token with write access at {endpoint()}/settings/tokens, then: hf auth login"


def _errno(error: Exception) -> int:
    """The error's number, 0 where it has none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = _OS_ERROR.search(str(error))
    return int(found[1]) if found else 0


def _brief(error: Exception) -> str:
    text = one_line(" ".join(str(error).split()))[:300].rstrip(".")
    return text or type(error).__name__
