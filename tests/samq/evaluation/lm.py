"""A model for lm-eval that answers from rules: what the tests of tasks and of their runner ask."""

from collections.abc import Callable
from typing import Any

from lm_eval.api.model import LM


class RuleLM(LM):
    """Scores a continuation and writes an answer by rules, and keeps what it was asked."""

    tokenizer_name = "rules"

    def __init__(
        self,
        score: Callable[[str, str], float] = lambda context, continuation: -float(len(continuation)),
        write: Callable[[str], str] = lambda prompt: "",
    ) -> None:
        super().__init__()
        self.score, self.write = score, write
        self.all_arguments: list[tuple[Any, ...]] = []

    def loglikelihood(self, requests, disable_tqdm=False):
        self.all_arguments += [request.args for request in requests]
        return [(self.score(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        self.all_arguments += [request.args for request in requests]
        return [-float(len(request.args[0])) for request in requests]

    def generate_until(self, requests, disable_tqdm=False):
        self.all_arguments += [request.args for request in requests]
        return [self.write(request.args[0]) for request in requests]

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in chat_history)

    @property
    def prompts(self) -> list[str]:
        """What was asked, each prompt once."""
        return list(dict.fromkeys(arguments[0] for arguments in self.all_arguments))
