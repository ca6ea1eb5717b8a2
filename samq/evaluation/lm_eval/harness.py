"""lm-eval's tasks on a GGUF: the harness's model class over llama.cpp in this process.

Requests are encoded, cut and scored as by lm-eval's own `hf` model, so that the two give the same numbers on the same
weights; only the work is shared between requests (`scoring`, `generation`). Importing this module registers the model
`samq-gguf`. lm-eval 0.4.13 knows no plugins: its own command line does not import us, so `samq lm-eval` runs it
with the model registered, and the command `lm_eval` is installed anew to do the same.
"""

import hashlib
import inspect
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from samq.errors import SamqError
from samq.evaluation.lm_eval.chat import Message, render_chat
from samq.evaluation.lm_eval.float32 import load_float32
from samq.evaluation.lm_eval.generation import generate
from samq.evaluation.lm_eval.sampling import Sampling
from samq.evaluation.lm_eval.scoring import Continuation, score
from samq.evaluation.tasks import FOLDER
from samq.llamacpp.runtime import KV_TYPES, Model
from samq.progress import Progress, bar, silent

logger = logging.getLogger(__name__)

_SAMPLING = ("temperature", "top_k", "top_p", "seed")
_IMPOSSIBLE = (-float("inf"), False)  # the answer to a request that failed
Pair = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, and the tokens of context and continuation


@register_model("samq-gguf")
class GgufLM(TemplateLM):
    """A GGUF as lm-eval's model.

    Args:
        gguf: an open model, which stays the caller's, or a file.
        context_tokens: what a prompt and its answer may have together; None, and at most: what the model was trained for.
        add_bos_token: whether texts start with BOS; None: as the GGUF says.
        prefix_token_id: what stands before a text without context; None: BOS, or EOS where there is none.
        kv_type: F32, F16, Q8_0 or Q4_0, the type of the KV cache.
        threads: threads of llama.cpp; None: one a physical core.
        float32: compute in float32 throughout, as `hf` does on a processor: 16-bit weights are held in 32 bits, and the KV
            cache is F32. For files only.
        progress: told how many requests of a call are done; None: a bar on the terminal.

    A request that fails is answered as impossible, or with an empty text, and so spoils neither the others nor their order;
    `failures` counts them by reason until it is cleared, and tells whether what is made of the answers can be believed.

    Raises SamqError if the file cannot be loaded, it lacks the tokens that are asked for, or there is no such `kv_type`.
    """

    _by_name: ClassVar[list[Counter[str]]] = []  # the failures of the models that lm-eval made

    def __init__(
        self,
        gguf: Model | str,
        context_tokens: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        kv_type: str = "F16",
        threads: int | None = None,
        float32: bool = False,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        if kv_type not in KV_TYPES:
            raise SamqError(f"there is no KV cache of type {kv_type!r}; choose {', '.join(KV_TYPES)}")
        if isinstance(gguf, Model):
            assert not float32, "an open model has its types already"
            self.model = gguf
        else:
            self.model = load_float32(Path(gguf)) if float32 else Model(Path(gguf))
        self.max_length = min(context_tokens or self.model.trained_tokens, self.model.trained_tokens)
        self.max_gen_toks = 256  # where a task does not say, as for hf
        self._add_bos = self.model.adds_bos if add_bos_token is None else add_bos_token
        if add_bos_token and self.model.bos is None:
            raise SamqError(f"{self.model.path} has no BOS token; leave add_bos_token out")
        self._prefix_token_id = prefix_token_id
        self._settings: dict[str, Any] = {"kv_type": "F32" if float32 else kv_type, "threads": threads}
        self.failures: Counter[str] = Counter()
        self._progress = progress
        self._encoded = lru_cache(maxsize=1024)(self._encode)  # the choices of an item share their context

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        """The model of `gguf=FILE,context_tokens=...`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        """The model of these arguments; lm-eval's batch size and device are llama.cpp's own affair."""
        try:
            inspect.signature(cls).bind(**arg_dict)
        except TypeError as error:
            raise SamqError(f"--model_args of samq-gguf: {error}; write gguf=FILE,context_tokens=4096") from error
        model = cls(**arg_dict)
        cls._by_name.append(model.failures)
        return model

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        if self.model.eos is None:
            raise SamqError(f"{self.model.path} names no EOS token; convert the model again with its tokenizer")
        return self.model.eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        return self.eot_token_id if self.model.bos is None else self.model.bos

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of built requests tells models apart by: all that a request's text depends on."""
        return f"samq-gguf-{hashlib.sha256((self.model.chat_template or '').encode()).hexdigest()[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The GGUF's template, for the record; None if none is to be applied."""
        return self.model.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The chat as text; without a generation prompt it ends inside its last message."""
        return render_chat(self.model, chat_history, continue_last=not add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids, with special tokens read as such; BOS in front unless the text brings it, or as told."""
        return list(self._encoded(string, add_special_tokens))

    def _encode(self, string: str, add_special_tokens: bool | None) -> tuple[int, ...]:
        tokens = self.model.tokenize(string, parse_special=True).tolist()
        if add_special_tokens is None:
            add_special_tokens = self._add_bos and tokens[:1] != [self.model.bos]
        return tuple([self.model.bos, *tokens] if add_special_tokens and self._add_bos else tokens)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability (nats) of each continuation after its context, and whether greedy decoding would give it.

        An empty continuation has probability 1. One that fails has probability 0: of logits that are not finite, of a batch
        that llama.cpp fails on, or because it is longer than the context alone.
        """
        pairs: list[Pair] = []
        reasons: dict[int, str] = {}
        for index, request in enumerate(requests):
            try:
                pairs.append((request.args, *self._pair(*request.args)))
            except SamqError as error:  # such as a model that names no token for an empty context
                reasons[index] = str(error)
                pairs.append((None, [], []))
        answers = self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)
        for index in reasons:
            answers[index] = _IMPOSSIBLE
        self._count(reasons, len(requests))
        return answers

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of context and continuation; neither shares a token with the other, and the context is not empty."""
        if context != "":
            tokens, rest = self._encode_pair(context, continuation)
            return (tokens, rest) if tokens else ([self.prefix_token_id], rest)
        rest = self.tok_encode(continuation, add_special_tokens=False)
        return (rest[:1], rest[1:]) if rest[:1] == [self.prefix_token_id] else ([self.prefix_token_id], rest)

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        answers = [(0.0, True)] * len(requests)
        reasons: dict[int, str] = {}
        asked = []
        cut = 0
        for index, (_texts, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                reasons[index] = f"a continuation is longer than the context of {self.max_length} tokens; give it more"
            elif continuation:
                room = self.max_length + 1 - len(continuation)  # the last token needs no room: nothing follows it
                cut += len(context) > room
                asked.append((index, Continuation(np.array(context[-room:]), np.array(continuation))))
        if cut:
            logger.warning(f"{cut} requests lose their beginning: the context has {self.max_length} tokens")
        waiting = {index for index, _ in asked}
        with self._bar("loglikelihood", disable_tqdm) as progress:

            def finish(index: int) -> None:
                waiting.remove(index)
                progress(len(requests) - len(waiting), len(requests))

            def failed(place: int, reason: str) -> None:
                reasons[asked[place][0]] = reason
                finish(asked[place][0])

            try:
                continuations = [continuation for _, continuation in asked]
                for found in score(self.model, continuations, failed=failed, **self._settings):
                    index = asked[found.index][0]
                    answers[index] = (found.log_probability, found.is_greedy)
                    if (texts := requests[index][0]) is not None:  # None: a window of a rolling request
                        self.cache_hook.add_partial("loglikelihood", texts, answers[index])
                    finish(index)
            except SamqError as error:  # there is no memory for a context
                reasons |= dict.fromkeys(waiting, str(error))
        for index in reasons:
            answers[index] = _IMPOSSIBLE
        self._count(reasons, len(requests))
        return answers

    def _count(self, reasons: Mapping[int, str], total: int) -> None:
        """Remember which of a call's requests failed, and warn of them."""
        if reasons:
            logger.warning(f"{len(reasons)} of {total} requests failed: {'; '.join(dict.fromkeys(reasons.values()))}")
            self.failures.update(reasons.values())

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability (nats) of each whole text, each token after as many before it as the context holds."""
        windows: list[Pair] = []
        counts = []
        reasons: dict[int, str] = {}
        for index, request in enumerate(requests):
            try:
                found = get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
                )
                texts = [(None, *make_disjoint_window(window)) for window in found]
            except SamqError as error:
                reasons[index] = str(error)
                texts = []
            windows += texts
            counts.append(len(texts))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum(log_probability for log_probability, _ in islice(scores, count)) for count in counts]
        for index in reasons:
            totals[index] = -float("inf")
        self._count(reasons, len(requests))
        for request, total in zip(requests, totals, strict=True):
            if total > -float("inf"):  # a failure is not to be kept
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each text up to its first stop string (left out), the end that the model makes, or `max_gen_toks`.

        Of the settings, `until`, `max_gen_toks` and its aliases, `do_sample`, `temperature`, `top_k`, `top_p`, `seed` and
        `num_beams` 1 are known; requests with others fail, and so do those for more tokens than the context has room for.
        """
        groups = defaultdict(list)  # what is generated alike, for one task: its prompts may begin with one preamble
        for index, request in enumerate(requests):
            groups[request.task_name, repr(request.args[1])].append(index)
        answers = [""] * len(requests)
        reasons: dict[int, str] = {}
        done = 0
        with self._bar("generate", disable_tqdm) as progress:
            for group in groups.values():

                def report(count: int, _: int, before: int = done) -> None:
                    progress(before + count, len(requests))

                def failed(place: int, reason: str, group: Sequence[int] = group) -> None:
                    reasons[group[place]] = reason

                prompts = [requests[index].args[0] for index in group]
                try:
                    texts = self._continue(prompts, requests[group[0]].args[1], report, failed)
                except SamqError as error:  # with these settings, or this memory, nothing can be generated
                    reasons.update(dict.fromkeys(group, str(error)))
                    report(len(group), len(group))
                else:
                    for index, text in zip(group, texts, strict=True):
                        if index not in reasons:
                            answers[index] = text
                            self.cache_hook.add_partial("generate_until", requests[index].args, text)
                done += len(group)
        self._count(reasons, len(requests))
        return answers

    def _continue(
        self, texts: Sequence[str], settings: dict[str, Any], progress: Progress, failed: Callable[[int, str], None]
    ) -> list[str]:
        """The answers to prompts with the same settings; raises SamqError if these cannot be followed."""
        limit, stops, sampling = self._understand(settings)
        prompts = [self.tok_encode(text) or [self.prefix_token_id] for text in texts]
        room = self.max_length - limit
        if cut := sum(len(prompt) > room for prompt in prompts):
            logger.warning(f"{cut} prompts lose their beginning: the context has {self.max_length} tokens, {limit} of "
                           "them for the answer")  # fmt: skip
        generated = generate(
            self.model,
            [np.array(prompt[-room:], np.int32) for prompt in prompts],
            limit=limit,
            finished=lambda text: any(stop in text for stop in stops),
            sampling=sampling,
            progress=progress,
            failed=failed,
            **self._settings,
        )
        return [postprocess_generated_text(text, stops, None) for text in generated]

    def _understand(self, settings: dict[str, Any]) -> tuple[int, list[str], Sampling]:
        """How many tokens, what ends an answer, and how tokens are chosen."""
        try:
            known: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        except (TypeError, ValueError) as error:
            raise SamqError(f"generation cannot follow the settings {settings}: {error}; correct the task") from error
        stops = [stop for stop in known.pop("until") if stop]
        limit = known.pop("max_gen_toks")
        if not 0 < limit < self.max_length:
            raise SamqError(f"max_gen_toks {limit} leaves a context of {self.max_length} no prompt; change one of them")
        sampled = known.pop("do_sample")
        sampling = {name: known.pop(name) for name in _SAMPLING if name in known}
        if known.get("num_beams") == 1:  # no search for beams: some of lm-eval's tasks say so
            del known["num_beams"]
        if known:
            raise SamqError(f"generation cannot follow the setting {min(known)}; leave it out of the task")
        return limit, stops, Sampling(**sampling) if sampled else Sampling()

    def _bar(self, what: str, quiet: bool) -> AbstractContextManager[Progress]:
        """Where the progress of a call goes."""
        if self._progress is None and not quiet:
            return bar(what)
        return nullcontext(self._progress or silent)


def run_command_line(arguments: Sequence[str]) -> None:
    """lm-eval's own command line, with the model `samq-gguf` and SAMQ's tasks.

    Raises SamqError at its end if requests failed: lm-eval itself takes them for wrong answers.
    """
    open_tasks = TaskManager.__init__

    def open_ours_too(manager: TaskManager, *args: Any, include_path: Any = None, **settings: Any) -> None:
        theirs = [include_path] if isinstance(include_path, str | Path) else include_path or []
        open_tasks(manager, *args, include_path=[FOLDER, *theirs], **settings)

    TaskManager.__init__ = open_ours_too  # lm-eval has no other way to add to its own
    sys.argv = ["lm-eval", *arguments]  # where lm-eval looks
    cli_evaluate()
    failures: Counter[str] = sum(GgufLM._by_name, Counter())
    if failures:
        raise SamqError(f"the figures above are not to be believed: {explain(failures)}")


def explain(failures: Mapping[str, int]) -> str:
    """Why requests failed, and how many."""
    return "; ".join(f"{reason} ({count} request{'s' if count > 1 else ''})" for reason, count in failures.items())
