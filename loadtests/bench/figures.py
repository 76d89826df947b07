"""What was found, one JSON line each, and what was asked of it."""

import json
from dataclasses import dataclass, field

TARGETS: dict[str, float] = {
    **{f"mixed / own base, batch {batch}": least for batch, least in ((8, 0.90), (16, 0.90), (32, 0.95))},
    **{f"mixed / transformers+peft mixed, batch {batch}": least for batch, least in ((8, 2.5), (32, 3.0))},
    "mixed / vllm mixed, batch 32": 7.0,
    **{f"base / vllm base, batch {batch}": least for batch, least in ((1, 1.3), (8, 1.3), (16, 1.3), (32, 1.5))},
    **{f"base / llama.cpp base, batch {batch}": least for batch, least in ((1, 1.0), (8, 1.0), (16, 1.0), (32, 1.2))},
    "mixed / llama.cpp base, batch 32": 1.1,
    "merged / own base, batch 1": 0.98,
    "bandwidth of base, batch 1 / read bandwidth": 0.85,
    "bandwidth of a cold merge / copy bandwidth": 0.75,
    "wide / own base, batch 32": 0.50,
    "zipf / own mixed, batch 32": 0.85,
}
"""Ratios that are to be at least this."""

LIMITS: dict[str, float] = {
    "first token with cached prefix / without": 0.15,
    "p99 gap while a prompt enters / median gap": 2.5,
    "adapter memory at all ranks / at one": 1.0,
}
"""Ratios that are to be at most this."""


@dataclass
class Figures:
    """Prints each figure as it is found, and keeps those that something was asked of."""

    judged: list[dict[str, object]] = field(default_factory=list)

    def show(self, **facts: object) -> None:
        """One line."""
        print(json.dumps(facts), flush=True)

    def judge(self, name: str, ratio: float, **facts: object) -> None:
        """One line of a ratio, beside what was asked of it, if anything was."""
        line: dict[str, object] = {"ratio": name, "found": round(ratio, 3)}
        if name in TARGETS:
            line |= {"at_least": TARGETS[name], "met": ratio >= TARGETS[name]}
        elif name in LIMITS:
            line |= {"at_most": LIMITS[name], "met": ratio <= LIMITS[name]}
        if "met" in line:
            self.judged.append(line)
        self.show(**line, **facts)

    def summarise(self) -> None:
        """A table of what was asked and found."""
        if not self.judged:
            return
        width = max(len(str(line["ratio"])) for line in self.judged)
        print(f"\n{'':{width}}    asked    found")
        for line in self.judged:
            asked = f">= {line['at_least']}" if "at_least" in line else f"<= {line['at_most']}"
            print(f"{line['ratio']:{width}}  {asked:>8} {line['found']:>8}  {'met' if line['met'] else 'MISSED'}")
