"""What is read from a record: an instruction, a formatted prompt, or a conversation."""

from __future__ import annotations

from dataclasses import dataclass

from .conversations import Conversation


@dataclass(frozen=True)
class Example:
    """A record with the fields of the LLM-Adapters datasets.

    Attributes:
        instruction: The question or task.
        output: The expected response.
        input: Context of the instruction, if it is separate from it.
        answer: The part of the response that is scored, if the dataset has it.
    """

    instruction: str
    output: str = ""
    input: str = ""
    answer: str = ""

    @property
    def whole(self) -> str:
        """The instruction with its input."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


@dataclass(frozen=True)
class Completion:
    """A prompt that is formatted already, and what follows it.

    Attributes:
        prompt: The prompt.
        output: The expected response.
    """

    prompt: str
    output: str = ""


Record = Example | Completion | Conversation
