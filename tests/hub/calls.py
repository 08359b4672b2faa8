"""What was asked: a log of every request to either origin."""

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass
class Call:
    """One request. `user` is whose token it carried; `status` is None where no answer was given.

    `sent` is the size of the answer's body in bytes, as far as it was meant to be sent; `fault` the fault that struck.
    """

    origin: str
    method: str
    path: str
    query: str
    user: str | None
    status: int | None = None
    sent: int = 0
    fault: str | None = None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    def fits(self, pattern: str, origin: str | None, user: str | None) -> bool:
        """Whether its `METHOD path` fits a pattern of fnmatch, and its origin and user are these, where given."""
        return fnmatchcase(str(self), pattern) and origin in (None, self.origin) and user in (None, self.user)
