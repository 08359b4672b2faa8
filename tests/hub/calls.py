"""What was asked: a log of every request to either origin."""

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass
class Call:
    """One request.

    `route` is what answers it, such as `/api/models/{id}`, or empty; `user` is whose token it carried; `status` is
    None where no answer was given; `sent` is the size of the answer's body in bytes, as far as it was meant to be
    sent; `fault` is the fault that struck.
    """

    origin: str
    method: str
    path: str
    route: str
    query: str
    user: str | None
    status: int | None = None
    sent: int = 0
    fault: str | None = None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    def fits(self, pattern: str, origin: str | None, user: str | None) -> bool:
        """Whether a pattern names it (see `named`), and its origin and user are these, where given."""
        named_so = named(pattern, self.method, self.path, self.route)
        return named_so and origin in (None, self.origin) and user in (None, self.user)


def named(pattern: str, method: str, path: str, route: str) -> bool:
    """Whether a pattern names a request: its route exactly, `GET /api/models/{id}`, or its path by fnmatch.

    In the second case `*` matches slashes, `GET /api/*`, and a path is as it was sent: `*/tree/refs%2Fpr%2F1`.
    """
    return pattern == f"{method} {route}" or fnmatchcase(f"{method} {path}", pattern)
