"""Other engines on the same work: PEFT in this process, the rest in processes of their own, whose packages differ."""

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from transformers import GenerationConfig

from loadtests import workload


class Contender(Protocol):
    """An engine that can be asked to do the work."""

    name: str
    modes: Sequence[str]

    def run(self, mode: str, batch: int) -> float:
        """Generate for `batch` prompts at once; seconds."""

    def close(self) -> None:
        """End what runs."""


class Peft(Contender):
    """transformers' `generate`, with PEFT's batches of several adapters for the mixed mode."""

    name = "transformers+peft"
    modes = ("base", "mixed")

    def __init__(self, folder: Path, dtype: str = "float32", device: str = "cpu") -> None:
        self._base = workload.load_base(folder, dtype, device).eval()
        wrapped = workload.load_base(folder, dtype, device)
        self._mixed = PeftModel.from_pretrained(wrapped, str(folder / "adapter0"), adapter_name="adapter0")
        for number in range(1, len(workload.RANKS)):
            self._mixed.load_adapter(str(folder / f"adapter{number}"), adapter_name=f"adapter{number}")
        self._mixed.eval()
        tokens = workload.NEW_TOKENS
        self._config = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)

    @torch.inference_mode()
    def run(self, mode: str, batch: int) -> float:
        """Generate for `batch` prompts at once; seconds."""
        ids = torch.tensor(workload.prompts(batch), device=self._base.device)
        names = {"adapter_names": [f"adapter{workload.adapter_of(row)}" for row in range(batch)]} if mode == "mixed" else {}
        model = self._mixed if mode == "mixed" else self._base
        started = time.perf_counter()
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=self._config, **names)
        made.cpu()  # on a GPU it is only then made
        return time.perf_counter() - started

    def close(self) -> None:
        """Nothing runs."""


class Worker(Contender):
    """A process that reads one JSON line per task and answers with the seconds it took.

    Its first line names its modes, once it is ready.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.modes = list(self._read()["modes"])

    def run(self, mode: str, batch: int) -> float:
        """Generate for `batch` prompts at once; seconds."""
        adapters = [workload.adapter_of(row) for row in range(batch)] if mode == "mixed" else []
        task = {"prompts": workload.prompts(batch), "new_tokens": workload.NEW_TOKENS, "adapters": adapters}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return float(self._read()["seconds"])

    def close(self) -> None:
        """End the process: it ends when it has no more to read."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print what they like
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError(f"{self.name} ended with {self._process.wait()}")
