"""Publishers that are forked from a process that has imported everything: many at once, and cheap to kill."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.hub.client import Client

PUBLISH = """
import json, os, traceback
from pathlib import Path
from huggingface_hub.utils import disable_progress_bars
from lora_merge.errors import LoraMergeError
from lora_merge.publish import persistence
from lora_merge.publish.push import push
from lora_merge.publish.repository import Target

def publish(folder):
    try:
        persistence.FIRST_WAIT = 0.1
        pushed = push(Path(folder), Target(repo, create_pr=create_pr), max_wait=20, tell=lambda line: None)
        return {"code": 0, "commit": pushed.published.commit, "changed": bool(pushed.published.changed)}
    except LoraMergeError as error:
        return {"code": error.exit_code, "said": error.message}
    except BaseException:
        return {"code": 1, "said": traceback.format_exc()}

disable_progress_bars()
os.environ["HF_TOKEN"] = token
go, start = os.pipe()
children = []
for folder in folders:
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(start)
        os.read(go, 1)  # ends when the parent closes its side: all at once
        os.write(tell, json.dumps(publish(folder)).encode())
        os._exit(0)
    os.close(tell)
    children.append((pid, told))
os.close(go)
Path(pids).write_text(" ".join(str(pid) for pid, _ in children))
os.close(start)
result = []
for pid, told in children:
    with os.fdopen(told) as file:
        text = file.read()
    os.waitpid(pid, 0)
    result.append(json.loads(text) if text else {"code": "killed"})
"""


def publish_at_once(
    client: Client, folders: Sequence[Path], *, repo: str, token: str, pids: Path, create_pr: bool = False
) -> list[dict[str, Any]]:
    """Push each folder to `repo`, each in a process of its own, all started at one moment; how each ended.

    Args:
        pids: a file that will hold the processes' ids.
    """
    given = {"folders": [str(folder) for folder in folders], "repo": repo, "token": token, "pids": str(pids)}
    ended: list[dict[str, Any]] = client.run(PUBLISH, **given, create_pr=create_pr)
    return ended
