"""One cache, fed with questions and with its own answers, greedily."""

from __future__ import annotations

from typing import Any

import torch

from hillinfer.eval.prompts import Question
from hillinfer.hkm.cache import HierarchicalCache


class Conversation:
    """Asks questions in turn; each sees those before it and their answers.

    evicts: the policy forgets for ever. Steps of several tokens are exact, so
    questions after the first are fed a token at a time: no step may see what is gone.
    """

    def __init__(self, model: Any, tokenizer: Any, cache: HierarchicalCache, evicts: bool = False) -> None:
        self._model, self._tokenizer, self._cache = model, tokenizer, cache
        self._evicts = evicts
        self._unfed: list[int] = []
        self._first = True
        end = model.generation_config.eos_token_id
        self._ends = set(end if isinstance(end, list) else [end])

    def ask(self, question: Question, max_new_tokens: int) -> str:
        """Return the answer: up to the first line end after text, the model's end token or the limit."""
        asked = self._unfed + self._encode(question.text)
        if self._evicts and not self._first:
            for token in asked[:-1]:
                self.feed([token])
            asked = asked[-1:]
        self._first = False
        token = int(self.feed(asked).argmax())
        new = [token]
        while not self._ended(new) and len(new) < max_new_tokens:
            token = int(self.feed([token]).argmax())
            new.append(token)
        answer = self._text(new)
        self._unfed = [token]
        if question.go_on:
            for _ in range(question.go_on):
                token = int(self.feed([token]).argmax())
            self._unfed = [token, *self._encode("\n")]
        elif not answer.endswith("\n"):
            self._unfed += self._encode("\n")
        return answer.strip().split("\n")[0]

    def feed(self, ids: list[int]) -> torch.Tensor:
        """Return the logits [vocabulary] after `ids`; a single one selects, several are exact."""
        out = self._model(
            input_ids=torch.tensor([ids], device=self._model.device),
            past_key_values=self._cache,
            logits_to_keep=1,
            use_cache=True,
        )
        logits: torch.Tensor = out.logits[0, -1]
        return logits

    def _ended(self, new: list[int]) -> bool:
        return new[-1] in self._ends or "\n" in self._text(new).lstrip()

    def _text(self, new: list[int]) -> str:
        return str(self._tokenizer.decode(new, skip_special_tokens=True))

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
