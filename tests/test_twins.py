"""The judges themselves: the dense twin of one client is that client, and every adapter really does something."""

import pytest

from tests.adapters import EXACT_OR_REFUSED, KINDS, Kind
from tests.dense import base_model, error, loaded, mean_model, relative
from tests.models import logits


@pytest.mark.parametrize("kind", [*KINDS, *EXACT_OR_REFUSED], ids=lambda kind: kind.name)
def test_the_dense_twin_of_one_client_answers_like_that_client(kind: Kind, federations) -> None:
    for folder in federations(kind).clients:
        assert error(kind, folder, mean_model(kind, [folder], [1.0])) < 1e-12


@pytest.mark.parametrize("kind", [*KINDS, *EXACT_OR_REFUSED], ids=lambda kind: kind.name)
def test_every_client_changes_the_base_and_differs_from_the_others(kind: Kind, federations) -> None:
    start = logits(base_model(kind))
    answers = [logits(loaded(kind, folder)) for folder in federations(kind).clients]
    assert min(relative(answer - start, start) for answer in answers) > 0.01
    assert min(relative(answer - answers[0], start) for answer in answers[1:]) > 0.01
