"""What a data file holds, whatever its format: prompts with completions, conversations, or labelled texts."""

from dataclasses import dataclass
from enum import StrEnum


class Task(StrEnum):
    """What an adapter is trained for; transformers' words."""

    CAUSAL_LM = "causal-lm"
    CLASSIFICATION = "sequence-classification"


@dataclass(frozen=True)
class Example:
    """One prompt, and the completions that are right for it (at least one).

    An empty prompt stands for plain text: every token of the completion is then trained on and measured.
    """

    prompt: str
    completions: tuple[str, ...]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `role` is "system", "user", "assistant", or whatever the model's template knows."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns in order, at least one of them the assistant's. A model's chat template makes Examples of it."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class LabelledText:
    """A text, or a pair of texts, and its class.

    Attributes:
        second: the other text of a pair.
        label: an index into `Corpus.labels`.
    """

    text: str
    label: int
    second: str | None = None


@dataclass(frozen=True)
class Corpus:
    """One data file, read and checked.

    Attributes:
        format: the name of the reader (`--format`).
        task: which of the three kinds `items` are: LabelledText for classification, else Example or Conversation.
        items: at least one, in the file's order.
        labels: the classes' names, for classification; a label is an index into them.
        source: the file and how many items, for a reader: "devset.csv, 547 prompts, 4672 references".
    """

    format: str
    task: Task
    items: tuple[Example, ...] | tuple[Conversation, ...] | tuple[LabelledText, ...]
    labels: tuple[str, ...] = ()
    source: str = ""
