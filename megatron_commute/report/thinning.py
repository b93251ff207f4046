"""Long records made short enough to draw: evenly spaced lines of each kind, and their number.

A record of months holds more lines than a picture has points. Whole series are in the export.
"""

from __future__ import annotations

LINES = 1000  # of losses, with and without validation each
NUMBERS = 3200  # of a key of the probes, domains and targets together
FEWEST = 50  # probes


class Kind:
    """Lines of one kind as they come, of which at most twice `most` are kept."""

    def __init__(self, most):
        self.most, self.stride, self.total = most, 1, 0
        self.kept, self.last = [], None

    def add(self, number, line):
        if self.total % self.stride == 0:
            self.kept.append((number, line))
            if len(self.kept) > 2 * self.most:
                self.kept, self.stride = self.kept[::2], 2 * self.stride
        self.last, self.total = (number, line), self.total + 1

    def lines(self):
        """(number, line) in order, the last always among them."""
        return self.kept if self.last is None or self.kept[-1][0] == self.last[0] else [*self.kept, self.last]


def thinned(lines):
    """(kept lines in their order, {event: lines there were}) of an iterable of record lines."""
    kinds, probes = {}, LINES
    for number, line in enumerate(lines):
        event = line["event"]
        if event == "start":
            K = len(line["names"])
            probes = max(FEWEST, NUMBERS // (2 * K * (K if line.get("target") == "each" else 1)))
        key = (event, bool(line.get("valid"))) if event == "loss" else (event, False)
        if key not in kinds:
            kinds[key] = Kind(probes if event == "probe" else LINES)
        kinds[key].add(number, line)
    totals = {}
    for (event, _), kind in kinds.items():
        totals[event] = totals.get(event, 0) + kind.total
    kept = sorted((pair for kind in kinds.values() for pair in kind.lines()), key=lambda pair: pair[0])
    return [line for _, line in kept], totals
