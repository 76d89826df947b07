"""What a data file holds, whatever its format: prompts with completions, conversations, or labelled texts."""

from dataclasses import dataclass, replace
from enum import StrEnum

from adapters.errors import DataError


class Task(StrEnum):
    """What an adapter is trained for; transformers' words."""

    CAUSAL_LM = "causal-lm"
    CLASSIFICATION = "sequence-classification"


@dataclass(frozen=True)
class Example:
    """One prompt, and the completions that are right for it (at least one).

    An empty prompt stands for plain text: every token of the completion is then trained on and measured.

    Attributes:
        end: what a chat template writes after the completion. The prompt then holds the model's special tokens as text
            already, and a tokenizer is to add none. None stands for a prompt without a template: the tokenizer's own
            special tokens come before it, and the end-of-text token after the completion.
    """

    prompt: str
    completions: tuple[str, ...]
    end: str | None = None


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns in order; the last one is the assistant's, the first one isn't. A chat template makes Examples of it."""

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

    def with_labels(self, labels: tuple[str, ...]) -> "Corpus":
        """The same texts with their labels counted in `labels`: those that a model was, or is to be, trained on.

        Two JSONL files of one task need not hold the same classes, and so number them differently.

        Raises:
            DataError: the corpus has a class that `labels` lacks.
        """
        unknown = [name for name in self.labels if name not in labels]
        if unknown:
            raise DataError(f"{self.source}: classes {', '.join(unknown)} are unknown; expected {', '.join(labels)}")
        moved = [labels.index(name) for name in self.labels]
        items = tuple(replace(item, label=moved[item.label]) for item in self.items if isinstance(item, LabelledText))
        return replace(self, items=items, labels=labels)
