"""The text of an answer up to its first stop string."""


class AnswerText:
    """The text of an answer, up to the first stop string, wherever the borders between tokens fall.

    If the stop text is not to be told, whatever may be the beginning of one is held back until it is known not to be.
    """

    def __init__(self, stops: tuple[str, ...], *, include_stop: bool) -> None:
        self._stops = stops
        self._include_stop = include_stop
        self._longest = max(map(len, stops), default=0)
        self._recent = ""
        """The end of all text pushed: as much as a stop string that is not complete may have."""
        self._held = ""
        self._told: list[str] = []

    @property
    def text(self) -> str:
        """All that was told."""
        return "".join(self._told)

    def push(self, piece: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """Add a piece: what may be told now, and whether a stop string ended the answer. Nothing may follow then.

        Args:
            may_stop: whether a stop string that is completed by this piece counts.
        """
        if not self._stops:
            return self._tell(piece), False
        text = self._recent + piece
        match = self._first_match(text, len(piece)) if may_stop else None
        ready = self._held + piece
        if match is not None:
            start, end = match
            cut = end if self._include_stop else start
            return self._tell(ready[: len(ready) - (len(text) - cut)]), True
        self._recent = text[-(self._longest - 1) :] if self._longest > 1 else ""
        kept = 0 if self._include_stop else self._possible_start(self._recent)
        self._held = ready[len(ready) - kept :]
        return self._tell(ready[: len(ready) - kept]), False

    def flush(self) -> str:
        """What was held back, when no piece is to follow."""
        piece, self._held = self._held, ""
        return self._tell(piece)

    def _tell(self, piece: str) -> str:
        if piece:
            self._told.append(piece)
        return piece

    def _first_match(self, text: str, added: int) -> tuple[int, int] | None:
        """Start and end of the stop string that ends first within the last `added` characters; of several, the longest."""
        spans = []
        for stop in self._stops:
            at = text.find(stop, max(0, len(text) - added - len(stop) + 1))
            if at >= 0:
                spans.append((at, at + len(stop)))
        return min(spans, key=lambda span: (span[1], span[0]), default=None)

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        for length in range(len(text), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
