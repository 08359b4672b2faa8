"""A repository that holds a global adapter, or is to hold one: where it is before somebody folds onto it."""

from lora_merge.checkpoint.peft_folder import LEDGER_NAME, WEIGHTS_NAME
from lora_merge.hub.session import hub_session
from lora_merge.hub.waiting import Tell
from lora_merge.publish.push import require_repository_name
from lora_merge.publish.repository import Target, head_of, tree


def head_with_adapter(repo: str, *, max_wait: float, tell: Tell) -> tuple[str, bool]:
    """The commit that a repository is at, and whether an adapter lies there; an empty text where there is none."""
    require_repository_name(repo)
    with hub_session(max_wait, tell) as api:
        head = head_of(api, Target(repo))
        if head is None:
            return "", False
        return head.commit, bool({WEIGHTS_NAME, LEDGER_NAME} & tree(api, repo, head.commit).keys())
