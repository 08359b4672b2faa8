"""A fixed sample of `python -m tests.fuzz`."""

import pytest

from tests.fuzz.branches import branches
from tests.fuzz.run import judge
from tests.fuzz.subjects import BUILT, FILES, Case, Corpus, make_corpus

MUTANTS = 50  # of each file
KINDS = [kind for kind in BUILT if kind.name in ("thin", "linear", "tokens")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root = tmp_path_factory.mktemp("fuzz")
    return Corpus(make_corpus(root / "corpus", KINDS), root / "scratch")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_a_mutant_is_refused_or_accepted_and_sound(name: str, corpus: Corpus) -> None:
    report = judge(corpus, [Case(name, seed) for seed in range(MUTANTS)])
    assert report.failed == []
    accepted = sum(count for (_, how), count in report.ended.items() if how.startswith("accepted"))
    assert 0.15 < accepted / MUTANTS < 0.85  # else the mutants would all end at the first check, or break nothing
    assert len(report.met.keys() & branches().keys()) >= 5
