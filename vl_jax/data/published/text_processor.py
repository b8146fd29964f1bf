"""The processor of published language models: a conversation as their chat template writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vl_jax.batch import Batch
from vl_jax.data.published.picture_text import make_row, stacked
from vl_jax.data.published.request import Message, Picture, Request
from vl_jax.data.published.stops import Stops, read_stops
from vl_jax.data.published.vocabulary import PublishedTokenizer
from vl_jax.data.text.chat_template import ChatTemplate


@dataclass(frozen=True)
class TextProcessor:
    """Turns what a user says into a ``Batch``."""

    tokenizer: PublishedTokenizer
    template: ChatTemplate
    max_tokens: int  # the context
    stops: Stops = Stops()  # beside the tokenizer's end token

    @classmethod
    def load(cls, folder: str | Path, *, max_tokens: int) -> TextProcessor | None:
        """Reads the tokenizer and the chat template of a checkpoint's folder; None if either is missing.

        Raises:
          ValueError: a file is malformed.
        """
        template = ChatTemplate.load(folder)
        if template is None or not (Path(folder) / "tokenizer.json").is_file():
            return None
        tokenizer = PublishedTokenizer(folder)
        return cls(tokenizer, template, max_tokens, read_stops(folder, tokenizer.added, template))

    def __call__(self, *, conversations: Sequence[Message], images: Sequence[Picture] | None = None) -> Batch:
        """The batch, of one row, that an answer is to follow; it holds no targets.

        Args:
          conversations: messages ``{"role", "content"}``; which roles may follow which is up to the template.
            An empty assistant's message at the end stands for the answer.
          images: none, for the model sees none.

        Raises:
          ValueError: a message has no text or brings images, the template refuses the conversation, or it
            is longer than the context.
        """
        messages = list(conversations)
        for number, message in enumerate(messages):
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise ValueError(f"conversation: message {number} needs a text under role and under content")
            if images or message.get("images"):
                raise ValueError("conversation: has images, the model is a language model")
        if messages and messages[-1]["role"] == "assistant":
            if messages[-1]["content"].strip():
                raise ValueError("conversation: the last assistant's message must be empty for inference")
            messages.pop()
        if not messages:
            raise ValueError("conversation: has no message to answer")
        given = [
            {**message, "content": self.template.content(message["content"], parts=False)}
            for message in messages
        ]
        text = self.template.text(given, add_generation_prompt=True)
        tokens = np.array(self.tokenizer.encode(text, complete=True), np.int32)
        if len(tokens) > self.max_tokens:
            raise ValueError(f"conversation: {len(tokens)} tokens, the context has {self.max_tokens}")
        return make_row(tokens, np.zeros(len(tokens), bool), np.zeros((1, 0, 1, 1, 3), np.uint8), None)

    def prompts(self, requests: Sequence[Request]) -> Batch:
        """Conversations that are to be answered, as rows of a batch; raises as for one of them."""
        return stacked([self(conversations=r.conversation, images=r.images) for r in requests])
