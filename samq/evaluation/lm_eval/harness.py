"""lm-eval's tasks on a GGUF: the harness's model class over llama.cpp in this process.

It encodes, cuts and scores requests as lm-eval's own `hf` model does, so that both give the same numbers on the same
weights. The difference is that requests share work (`scoring`, `generation`). Importing this module registers the model
`samq-gguf`. lm-eval 0.4.13 has no plugins, and its own command line does not import this module; `samq lm-eval` runs that
command line with the model registered.
"""

import hashlib
import inspect
import logging
import sys
from argparse import ArgumentParser
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
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
from samq.evaluation.lm_eval.benchmark_tasks import TaskLibrary
from samq.evaluation.lm_eval.float32 import load_float32
from samq.evaluation.lm_eval.room import benchmark_room
from samq.evaluation.lm_eval.scoring import Continuation, score
from samq.evaluation.tasks import FOLDER
from samq.llamacpp.chat import ChatMessage, render_chat
from samq.llamacpp.fit import choose_gpu_share
from samq.llamacpp.generation import Decoding, generate
from samq.llamacpp.runtime import KV_TYPES, Model
from samq.llamacpp.sampling import Sampling
from samq.progress import Progress, bar, silent

logger = logging.getLogger(__name__)

_SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "seed")
_IMPOSSIBLE = (-float("inf"), False)  # the answer to a failed request
Pair = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, and the tokens of context and continuation


@register_model("samq-gguf")
class GgufLM(TemplateLM):  # type: ignore[misc]
    """A GGUF as lm-eval's model.

    Args:
        gguf: an open model, which the caller closes, or a file.
        context_tokens: limit of a prompt and its answer together; None, and at most: the context the model was trained for.
        add_bos_token: whether texts start with BOS; None: as the GGUF says.
        prefix_token_id: the token before a text without context; None: BOS, or EOS if the model has no BOS.
        kv_type: type of the KV cache: F32, F16, Q8_0 or Q4_0.
        threads: threads of llama.cpp; None: one a physical core.
        float32: compute in float32 throughout, as `hf` does on a processor: 16-bit weights are loaded as 32 bits, and the
            KV cache is F32. For files only.
        progress: gets the number of finished requests of a call; None: a bar on the terminal.

    The answer to a failed request is "impossible", or an empty text, so that the other answers keep their order.
    `failures` counts failed requests by reason until it is cleared. If it is not empty, lm-eval's metrics are wrong.

    Raises SamqError if the file cannot be loaded, if it lacks the tokens that the arguments ask for, or if `kv_type` is
    unknown.
    """

    _all_failures: ClassVar[list[Counter[str]]] = []  # of the models that lm-eval created

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
            raise SamqError(f"a KV cache cannot have the type {kv_type!r}; choose one of {', '.join(KV_TYPES)}")
        if isinstance(gguf, Model):
            assert not float32, "the types of an open model are fixed"
            self.model = gguf
        else:
            path, room = Path(gguf), partial(benchmark_room, context_tokens, "F32" if float32 else kv_type)
            self.model = (
                load_float32(path, room) if float32 else Model(path, gpu_layers=choose_gpu_share(path, None, room))
            )
        self.max_length = min(context_tokens or self.model.trained_tokens, self.model.trained_tokens)
        self.max_gen_toks = 256  # if a task does not set it, as for hf
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
        """The model of these arguments; ignores lm-eval's batch size and device, which llama.cpp decides."""
        try:
            inspect.signature(cls).bind(**arg_dict)
        except TypeError as error:
            raise SamqError(f"--model_args of samq-gguf: {error}; write gguf=FILE,context_tokens=4096") from error
        model = cls(**arg_dict)
        cls._all_failures.append(model.failures)
        return model

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        if self.model.eos is None:
            raise SamqError(f"{self.model.path} has no EOS token; convert the model again with its tokenizer")
        return int(self.model.eos)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        return self.eot_token_id if self.model.bos is None else self.model.bos

    @property
    def tokenizer_name(self) -> str:
        """The model's key in lm-eval's cache of built requests: it covers all that the text of a request depends on."""
        return f"samq-gguf-2-{hashlib.sha256((self.model.chat_template or '').encode()).hexdigest()[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The GGUF's template, for lm-eval's record; None if lm-eval is not to apply it."""
        return self.model.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[ChatMessage], add_generation_prompt: bool = True) -> str:
        """The chat as text; without a generation prompt it ends inside its last message.

        A system message that the template refuses or drops becomes part of the next user message. `hf` leaves it out.
        """
        return render_chat(self.model, chat_history, continue_last=not add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids; parses special tokens. By default adds BOS unless the text starts with it."""
        return list(self._encoded(string, add_special_tokens))

    def _encode(self, string: str, add_special_tokens: bool | None) -> tuple[int, ...]:
        tokens = self.model.tokenize(string, parse_special=True).tolist()
        if add_special_tokens is None:
            add_special_tokens = self._add_bos and tokens[:1] != [self.model.bos]
        return tuple([self.model.bos, *tokens] if add_special_tokens and self._add_bos else tokens)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability (nats) of each continuation after its context, and whether greedy decoding would give it.

        An empty continuation has probability 1. A failed request has probability 0: its logits are not finite, llama.cpp
        failed on its batch, or the continuation is longer than the model's context.
        """
        pairs: list[Pair] = []
        reasons: dict[int, str] = {}
        for index, request in enumerate(requests):
            try:
                pairs.append((request.args, *self._pair(*request.args)))
            except SamqError as error:  # for example, the model has no token for an empty context
                reasons[index] = str(error)
                pairs.append((None, [], []))
        answers = self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)
        for index in reasons:
            answers[index] = _IMPOSSIBLE
        self._count(reasons, len(requests))
        return answers

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of context and continuation; no token spans both, and the context is not empty."""
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
        indices: list[int] = []  # of the requests in `continuations`
        continuations: list[Continuation] = []
        cut = 0
        for index, (_texts, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                reasons[index] = (
                    f"a continuation is longer than the context of {self.max_length} tokens; raise context_tokens"
                )
            elif continuation:
                room = self.max_length + 1 - len(continuation)  # the last token takes no room: nothing follows it
                cut += len(context) > room
                indices.append(index)
                continuations.append(Continuation(np.array(context[-room:]), np.array(continuation)))
        if cut:
            logger.warning(f"{cut} requests lose their beginning: the context has {self.max_length} tokens")
        waiting = set(indices)
        with self._bar("loglikelihood", disable_tqdm) as progress:

            def finish(index: int) -> None:
                waiting.remove(index)
                progress(len(requests) - len(waiting), len(requests))

            def failed(number: int, reason: str) -> None:
                reasons[indices[number]] = reason
                finish(indices[number])

            try:
                for result in score(self.model, continuations, failed=failed, **self._settings):
                    index = indices[result.index]
                    answers[index] = (result.log_probability, result.is_greedy)
                    if (texts := requests[index][0]) is not None:  # None: a window of a rolling request
                        self.cache_hook.add_partial("loglikelihood", texts, answers[index])
                    finish(index)
            except SamqError as error:  # not enough memory for a context
                reasons |= dict.fromkeys(waiting, str(error))
        for index in reasons:
            answers[index] = _IMPOSSIBLE
        self._count(reasons, len(requests))
        return answers

    def _count(self, reasons: Mapping[int, str], total: int) -> None:
        """Add a call's failed requests to `failures`, and log a warning."""
        if reasons:
            logger.warning(f"{len(reasons)} of {total} requests failed: {'; '.join(dict.fromkeys(reasons.values()))}")
            self.failures.update(reasons.values())

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability (nats) of each whole text; each token is scored after as many tokens as the context holds."""
        windows: list[Pair] = []
        counts = []
        reasons: dict[int, str] = {}
        for index, request in enumerate(requests):
            try:
                rolling = get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
                )
                pairs: list[Pair] = [(None, *make_disjoint_window(window)) for window in rolling]
            except SamqError as error:
                reasons[index] = str(error)
                pairs = []
            windows += pairs
            counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum(log_probability for log_probability, _ in islice(scores, count)) for count in counts]
        for index in reasons:
            totals[index] = -float("inf")
        self._count(reasons, len(requests))
        for request, total in zip(requests, totals, strict=True):
            if total > -float("inf"):  # do not cache a failure
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each text up to its first stop string (left out), the end that the model makes, or `max_gen_toks`.

        The known settings are `until`, `max_gen_toks` and its aliases, `do_sample`, `temperature`, `top_k`, `top_p`, `seed`
        and `num_beams` 1. Requests with other settings fail, and so do requests for more tokens than the context holds.
        """
        # By task and settings: the prompts of a task may share a prefix.
        groups = defaultdict(list)
        prompts: dict[int, list[int]] = {}
        reasons: dict[int, str] = {}
        for index, request in enumerate(requests):
            try:
                prompts[index] = self.tok_encode(request.args[0]) or [self.prefix_token_id]
            except SamqError as error:  # for example, the text has half a character
                reasons[index] = str(error)
            else:
                groups[request.task_name, repr(request.args[1])].append(index)
        answers = [""] * len(requests)
        finished = len(reasons)
        with self._bar("generate", disable_tqdm) as progress:
            for group in groups.values():

                def report(count: int, _: int, before: int = finished) -> None:
                    progress(before + count, len(requests))

                def failed(number: int, reason: str, group: Sequence[int] = group) -> None:
                    reasons[group[number]] = reason

                settings = requests[group[0]].args[1]
                try:
                    texts = self._continue([prompts[index] for index in group], settings, report, failed)
                except SamqError as error:  # the settings are unknown, or there is not enough memory
                    reasons.update(dict.fromkeys(group, str(error)))
                    report(len(group), len(group))
                else:
                    for index, text in zip(group, texts, strict=True):
                        if index not in reasons:
                            answers[index] = text
                            self.cache_hook.add_partial("generate_until", requests[index].args, text)
                finished += len(group)
        self._count(reasons, len(requests))
        return answers

    def _continue(
        self,
        prompts: Sequence[Sequence[int]],
        settings: dict[str, Any],
        progress: Progress,
        failed: Callable[[int, str], None],
    ) -> list[str]:
        """The answers to prompts with the same settings; raises SamqError if a setting is not supported."""
        limit, stops, sampling = self._parse_settings(settings)
        room = self.max_length - limit
        if cut := sum(len(prompt) > room for prompt in prompts):
            logger.warning(
                f"{cut} prompts lose their beginning: the context has {self.max_length} tokens, {limit} of them for the "
                "answer"
            )
        generated = generate(
            self.model,
            [np.array(prompt[-room:], np.int32) for prompt in prompts],
            Decoding(limit, lambda text: any(stop in text for stop in stops), sampling),
            progress=progress,
            failed=failed,
            **self._settings,
        )
        return [postprocess_generated_text(text, stops, None) for text in generated]

    def _parse_settings(self, settings: dict[str, Any]) -> tuple[int, list[str], Sampling]:
        """The limit of an answer in tokens, its stop strings, and the sampling."""
        try:
            rest: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        except (TypeError, ValueError) as error:
            raise SamqError(f"cannot generate with the settings {settings}: {error}; correct the task") from error
        stops = [stop for stop in rest.pop("until") if stop]
        limit = rest.pop("max_gen_toks")
        if not 0 < limit < self.max_length:
            raise SamqError(
                f"max_gen_toks {limit} leaves no room for a prompt in a context of {self.max_length} tokens; change one of "
                "them"
            )
        do_sample = rest.pop("do_sample")
        sampling = {name: rest.pop(name) for name in _SAMPLING_SETTINGS if name in rest}
        if rest.get("num_beams") == 1:  # some of lm-eval's tasks set it; it means no beam search
            del rest["num_beams"]
        if rest:
            raise SamqError(f"generation does not support the setting {min(rest)}; leave it out of the task")
        return limit, stops, Sampling(**sampling) if do_sample else Sampling()

    def _bar(self, what: str, quiet: bool) -> AbstractContextManager[Progress]:
        """The progress function of a call."""
        if self._progress is None and not quiet:
            return bar(what)
        return nullcontext(self._progress or silent)


def run_command_line(arguments: Sequence[str]) -> None:
    """lm-eval's own command line, with the model `samq-gguf` and SAMQ's tasks.

    Raises SamqError at the end if requests failed, since lm-eval counts them as wrong answers.
    """
    original_init = TaskManager.__init__
    more = {"include_defaults": False} if _needs_no_others(arguments) else {}

    def init_with_our_tasks(manager: TaskManager, *args: Any, include_path: Any = None, **settings: Any) -> None:
        theirs = [include_path] if isinstance(include_path, str | Path) else include_path or []
        original_init(manager, *args, include_path=[FOLDER, *theirs], **settings | more)

    TaskManager.__init__ = init_with_our_tasks  # lm-eval has no other way to add tasks to its own
    sys.argv = ["lm-eval", *arguments]  # lm-eval reads its arguments there
    cli_evaluate()
    failures: Counter[str] = sum(GgufLM._all_failures, Counter())
    if failures:
        raise SamqError(f"the results above are wrong, since requests failed: {explain(failures)}")


def _needs_no_others(arguments: Sequence[str]) -> bool:
    """Whether all tasks that lm-eval's arguments name are SAMQ's or the user's: to search the others takes six seconds."""
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--tasks", "-t", nargs="*", default=[])
    parser.add_argument("--include_path", type=Path, nargs="?")
    options, _ = parser.parse_known_args(arguments)
    names = [name for part in options.tasks for name in part.split(",")]
    try:
        return bool(names) and TaskLibrary([options.include_path] if options.include_path else []).are_near(names)
    except SamqError:  # lm-eval will say what is wrong with the folder
        return False


def explain(failures: Mapping[str, int]) -> str:
    """The reasons why requests failed, each with the number of requests."""
    return "; ".join(f"{reason} ({count} request{'s' if count > 1 else ''})" for reason, count in failures.items())
