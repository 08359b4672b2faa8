"""Single bits flipped in what the Hub sends, anywhere in any file, over Xet and without: every one must be noticed.

`python -m tests.sources.flips [COUNT]` prints its count; the test takes a sample.
"""

import random
import sys
from collections import Counter

from tests.conftest import digests
from tests.sources.federation import adapter
from tests.sources.matrix import Bench, bench

FILES = {name: len(content) for name, content in adapter("org/client-1").items()}
WEIGHTS = "adapter_model.safetensors"


def flip(made: Bench, draw: random.Random) -> str:
    """One bit, once or in every answer; how the merge ended. Raises `AssertionError` where nobody noticed."""
    name, xet, times = draw.choice(sorted(FILES)), draw.random() < 0.5, draw.choice([1, None])
    patterns = ("GET /lfs/*", "GET /xorbs/*") if name == WEIGHTS else (f"GET */{name}",)
    puller = made.pullers[xet]
    made.hub.clear_faults()
    offset = draw.randrange(FILES[name])
    faults = [made.hub.fault(pattern, "flip", times=times, offset=offset) for pattern in patterns]
    code, err = made.pull(puller)
    made.hub.clear_faults()
    case = f"{name} at {offset}, {'Xet' if xet else 'LFS'}, {'once' if times else 'always'}"
    assert any(fault.hits for fault in faults), case
    if code == 0:
        assert digests(puller.folder / "global") == made.expected, f"{case}: other bytes, unnoticed"
        return "fetched again"
    assert not times, f"{case}: exit {code}: {err}"
    assert code in (3, 5), f"{case}: exit {code}: {err}"
    assert not (puller.folder / "global").exists()
    return f"refused, exit {code}"


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    draw, ended = random.Random(0), Counter[str]()
    for made in bench():
        made.expect(made.pullers[False])
        for _ in range(count):
            ended[flip(made, draw)] += 1
    print(f"{count} bits flipped, none unnoticed: " + ", ".join(f"{n} {how}" for how, n in ended.most_common()))


if __name__ == "__main__":
    main()
