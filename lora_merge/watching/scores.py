"""The curve as it grows: each state of the global adapter measured once, and stored."""

import math
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_merge.errors import NetworkError
from lora_merge.evaluation.comparison import Question
from lora_merge.evaluation.intervals import Estimate
from lora_merge.evaluation.meter import Measured, Meter
from lora_merge.intake import Reading
from lora_merge.watching import curve
from lora_merge.watching.events import Arrival, Started
from lora_merge.watching.pace import Pace

LARGEST = 700.0  # nats a token: e to more than that is no number


class Scores:
    """Measures what a watch yields, and appends it to a curve; a state that the curve ends with is not measured again.

    Args:
        question: its rows are read now. Without a base, that is the one that the global adapter names.
        path: of the curve; what is there is gone on with.
    """

    def __init__(
        self,
        question: Question,
        path: Path,
        reading: Reading,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        self.path, self._reading, self._wait = path, reading, wait
        self._meter = Meter(question, reading.tell, reading.progress)
        lines = curve.read(path)
        self._last: str | None = lines[-1]["inputs"] if lines else None
        self._is_new = not lines

    def of(self, place: str, event: Started | Arrival) -> Iterator[dict[str, Any]]:
        """The records of an event, stored: of the base before the first, and of the global adapter as it is now."""
        digest, ledger = curve.inputs_digest(event.ledger), event.ledger
        if ledger is None or digest == self._last:
            return
        made = event.made if isinstance(event, Arrival) else event.commit
        adapter = f"hf://{place}@{made}" if made else Path(place)
        measured = self._patiently(lambda: self._meter(adapter, f"{len(ledger.contributions)} clients"))
        about = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "global": place}
        if self._is_new:
            base = {"commit": None, "inputs": None, "clients": 0, "client": None, "source": None, "replaced": False}
            yield self._stored({**about, **base, "examples": 0}, self._meter.base_alone())
        arrived = event if isinstance(event, Arrival) else None
        who = {
            "commit": made,
            "inputs": digest,
            "clients": len(ledger.contributions),
            "client": arrived.client if arrived else None,
            "source": arrived.source if arrived else None,
            "replaced": bool(arrived and arrived.replaced),
            "examples": curve.examples_of(ledger),
        }
        yield self._stored({**about, **who}, measured)
        self._last, self._is_new = digest, False

    def _patiently(self, measure: Callable[[], Measured]) -> Measured:
        """What is measured, after a network that fails has come back."""
        pace = Pace(1.0)
        while True:
            try:
                return measure()
            except NetworkError as error:
                pause = pace.after_nothing()
                self._reading.tell(f"{error.message} The next try is in {pause:.0f} s.")
                self._wait(pause)

    def _stored(self, record: dict[str, Any], measured: Measured) -> dict[str, Any]:
        record |= {"data": Path(self._meter.question.data).name, "rows": measured.rows}
        record |= {"answer_tokens": measured.answer_tokens}
        readable = math.isfinite(measured.loss.value) and measured.loss.interval.high < LARGEST
        loss, perplexity = (measured.loss, measured.loss.exp()) if readable else (None, None)
        record |= {"loss": _numbers(loss), "perplexity": _numbers(perplexity)}
        curve.append(self.path, record)
        return record


def _numbers(estimate: Estimate | None) -> dict[str, float] | None:
    if estimate is None:
        return None
    return {"value": estimate.value, "low": estimate.interval.low, "high": estimate.interval.high}
