"""The demo's rows come from sources that are parsed and never run, and nothing is both learnt and judged by."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from lora_merge.demo.areas import AREAS, Area
from lora_merge.demo.corpus import Corpus, Function, build, functions_of, prompt_of, write
from lora_merge.errors import NotFoundError

MODULE = '''
raise SystemExit("imported")

class Bucket:
    @property
    def level(self, scale=1.0):
        """How full it is,
        as a share. A second sentence.

        A second paragraph.
        """
        # a comment stays

        return scale * self.contents / self.volume

    def pour(self):
        """Subclasses say how it is done."""
        raise NotImplementedError("and so there is nothing here to learn")

async def fill(bucket, water, seconds=10):
    """Fill the bucket and wait."""
    async for drop in water.drops(seconds):
        bucket.add(drop)

def silent(bucket, water, seconds):
    return [bucket.add(drop) for drop in water.drops(seconds)]

def unfinished(bucket, water, seconds=10):
    """fill the bucket but do not end the sentence"""
    return [bucket.add(drop) for drop in water.drops(seconds)]
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "bucket.py").write_text(MODULE)
    (tmp_path / "copy.py").write_text(MODULE)
    return tmp_path


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build(AREAS, rows=72, held_out_rows=48)


def test_a_function_is_its_code_without_docstring_and_decorators_and_the_first_sentence(library: Path) -> None:
    found = functions_of(["package"], library)
    assert {function.name: (function.code, function.sentence) for function in found} == {
        "Bucket.level": (
            "def level(self, scale=1.0):\n    # a comment stays\n    return scale * self.contents / self.volume",
            "How full it is, as a share.",
        ),
        "fill": (
            "async def fill(bucket, water, seconds=10):\n"
            "    async for drop in water.drops(seconds):\n        bucket.add(drop)",
            "Fill the bucket and wait.",
        ),
    }


def test_copies_of_a_function_count_once(library: Path) -> None:
    assert [function.name for function in functions_of(["copy.py", "package"], library)] == [
        function.name for function in functions_of(["package", "copy.py", "absent.py"], library)
    ]
    assert len(functions_of(["copy.py", "package"], library)) == 2


def test_a_held_out_function_is_never_trained_on_not_even_a_copy_of_it(library: Path) -> None:
    (library / "other.py").write_text(MODULE.replace("fill", "drain").replace("Fill", "Drain").replace("add", "take"))
    area = Area("water", train=("other.py", "copy.py"), held_out=("package",))
    corpus = build([area], rows=9, held_out_rows=9, library=library)
    assert {function.name for function in corpus.held_out} == {"Bucket.level", "fill"}
    assert [function.name for function in corpus.train["water"]] == ["drain"]


def test_the_areas_share_no_module() -> None:
    paths = [path for area in AREAS for path in (*area.train, *area.held_out)]
    assert len(paths) == len(set(paths))
    assert not [(a, b) for a in paths for b in paths if a != b and b.startswith(f"{a}/")]


def test_every_area_of_this_python_has_rows_enough(corpus: Corpus) -> None:
    assert {name: len(functions) for name, functions in corpus.train.items()} == dict.fromkeys(
        ("networking", "text", "concurrency", "data-formats"), 72
    )
    assert len(corpus.held_out) == 48


def test_no_module_name_or_code_is_both_learnt_and_judged_by(corpus: Corpus) -> None:
    learnt = [function for functions in corpus.train.values() for function in functions]
    for key in ("module", "name", "code"):
        assert not {getattr(f, key) for f in learnt} & {getattr(f, key) for f in corpus.held_out}, key


def test_the_rows_are_the_same_each_time(corpus: Corpus) -> None:
    assert build(AREAS, rows=72, held_out_rows=48) == corpus


def test_fewer_rows_are_the_first_of_more(corpus: Corpus) -> None:
    fewer = build(AREAS, rows=8, held_out_rows=48)
    assert all(fewer.train[name] == corpus.train[name][:8] for name in corpus.train)


def test_no_module_of_the_standard_library_is_imported_for_it() -> None:
    program = (
        "from lora_merge.demo.areas import AREAS; from lora_merge.demo.corpus import build; import sys; "
        "build(AREAS, rows=9, held_out_rows=9); print(sorted({'ftplib', 'imaplib', 'mailbox'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_python_without_sources_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="standard library are not in"):
        build(AREAS, rows=9, held_out_rows=9, library=tmp_path)


def test_a_row_is_a_prompt_that_ends_where_the_answer_begins(tmp_path: Path) -> None:
    function = Function("a.py", "f", "def f(): ...", "Do it.")
    write(Corpus({"text": (function,)}, (function, function)), tmp_path / "data")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["held-out.jsonl", "text.jsonl"]
    assert len((tmp_path / "data" / "held-out.jsonl").read_text().splitlines()) == 2
    assert function.row()["prompt"] == prompt_of("def f(): ...")
    assert function.row()["prompt"].endswith("\n\nDocstring:")
    assert function.row()["completion"] == " Do it."


def test_the_standard_library_is_where_this_python_says() -> None:
    assert (Path(sysconfig.get_path("stdlib")) / "textwrap.py").is_file()
