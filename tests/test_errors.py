"""How refusals are told."""

import pytest

from lora_merge.errors import ALL_CLIENTS, Problem, RefusedError


@pytest.mark.parametrize(
    ("clients", "lead"),
    [
        (["a"], "1 problem in 1 input:"),
        (["a", "a", "b"], "3 problems in 2 inputs:"),
        ([ALL_CLIENTS] * 4, "4 problems of all clients together:"),
        ([ALL_CLIENTS, "a"], "2 problems in 1 input and of all clients together:"),
    ],
)
def test_all_clients_are_not_counted_as_one(clients: list[str], lead: str) -> None:
    problems = [Problem(client, f"module {number}", "no") for number, client in enumerate(clients)]
    assert str(RefusedError(problems)).splitlines()[0] == lead


def test_another_base_is_told_before_what_it_explains() -> None:
    problems = [Problem("a", "attention", "12"), Problem("a", "base_model_name_or_path", "b"), Problem("a", "x", "12")]
    shown = [problem.field for problem in RefusedError(problems).problems]
    assert shown == ["base_model_name_or_path", "attention", "x"]
