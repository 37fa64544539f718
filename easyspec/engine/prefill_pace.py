"""How many prompt rows a step may take while others decode: chosen from what rows were measured to cost."""

from __future__ import annotations

from easyspec.engine.average import Average

# Never fewer, or a prompt would hardly advance; and what is tried before anything has been measured.
MIN_PROMPT_ROWS = 16
_FIRST_PROMPT_ROWS = 32
_FIRST_SLICED_ROWS = 64
# How far an estimate follows one measurement, and how far a measurement may stray from it: a pause of the machine is
# not a price.
_RATE = 0.25
_MOST_STRAY = 3.0


class PrefillPace:
    """Keeps running estimates of what a step costs without prompts, by rows, and what each prompt row adds."""

    def __init__(self, max_slowdown: float, most_rows: int) -> None:
        self._max_slowdown = max_slowdown
        self._most_rows = most_rows
        self._step_ns: dict[int, Average] = {}  # by class of rows
        self._row_ns = _average()
        self._layer_row_ns = _average()

    def num_prompt_rows(self, num_decode_rows: int, *, is_anyone_decoding: bool) -> int:
        """The most prompt rows for a step that has `num_decode_rows` others."""
        if not is_anyone_decoding:
            return self._most_rows
        return self._affordable_rows(num_decode_rows, self._row_ns, _FIRST_PROMPT_ROWS)

    def observe(self, num_decode_rows: int, num_prompt_rows: int, elapsed_ns: int) -> None:
        if num_prompt_rows == 0:
            self._step_ns.setdefault(_row_class(num_decode_rows), _average()).add(elapsed_ns)
            return
        without_ns = self._expected_step_ns(num_decode_rows)
        if without_ns is not None and num_prompt_rows >= MIN_PROMPT_ROWS:
            self._row_ns.add(max(elapsed_ns - without_ns, 0.05 * elapsed_ns) / num_prompt_rows)

    def slice_ns(self, num_decode_rows: int) -> float:
        """How long a step may compute layers of a prompt beside `num_decode_rows` others."""
        return (self._max_slowdown - 1.0) * (self._expected_step_ns(num_decode_rows) or 0.0)

    def num_sliced_rows(self) -> int:
        """Rows of a piece that is computed layer by layer: as many as a layer may have within a step."""
        return self._affordable_rows(0, self._layer_row_ns, _FIRST_SLICED_ROWS)

    def observe_layers(self, num_rows: int, num_layers: int, elapsed_ns: int) -> None:
        """What a slice of a piece took."""
        self._layer_row_ns.add(elapsed_ns / (num_rows * num_layers))

    def _affordable_rows(self, num_decode_rows: int, row_ns: Average, first: int) -> int:
        """Rows of this price that fit beside the others; `first` before anything was measured."""
        num_rows = int(self.slice_ns(num_decode_rows) / row_ns.value) if self._step_ns and row_ns.count else first
        return min(max(num_rows, MIN_PROMPT_ROWS), self._most_rows)

    def _expected_step_ns(self, num_rows: int) -> float | None:
        """Of the largest measured class up to that of `num_rows`, else of the smallest."""
        if not self._step_ns:
            return None
        size = _row_class(num_rows)
        known = [other for other in self._step_ns if other <= size]
        return self._step_ns[max(known, default=min(self._step_ns))].value


def _row_class(num_rows: int) -> int:
    """Steps of similar numbers of rows share an estimate: the next power of two."""
    return 1 << max(0, num_rows - 1).bit_length()


def _average() -> Average:
    return Average(_RATE, _MOST_STRAY)
