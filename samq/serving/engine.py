"""The engines: programs that speak OpenAI's API. Each is a command, flags that SAMQ sets itself, and a path to probe."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samq.errors import SamqError
from samq.llamacpp.reason import reason_in
from samq.llamacpp.toolchain import environment, find_toolchain, program
from samq.serving.settings import ServingSettings

_GGML_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "IQ4_NL": 20,
    "BF16": 30,
}  # ggml.h
_CHECK_TIMEOUT_S = 60
# A tokenizer may add EOS to texts, as training has it: a prompt that ends with it is over before the answer.
_WITHOUT_EOS = "tokenizer.ggml.add_eos_token=bool:false"
# Flags for models that do not chat, by the path that they are asked at
_OTHER_USES = {"/v1/rerank": {"reranking", "rerank"}, "/v1/embeddings": {"embeddings", "embedding"}}
_SPECULATION = {"draft": "draft-simple", "mtp": "draft-mtp", "ngram": "ngram-simple"}


@dataclass(frozen=True)
class Loading:
    """What a model is loaded with: tokens of a request's context, and layers on the GPU."""

    context_tokens: int
    gpu_layers: int | None  # None: as many as the GPU holds

    def attempts(self, least_context_tokens: int, fewest_layers: int | None) -> Iterator["Loading"]:
        """Itself, and where memory is short: fewer layers on the GPU, then half the context again and again."""
        yield self
        if self.gpu_layers not in (0, fewest_layers):
            yield Loading(self.context_tokens, fewest_layers)
        tokens = self.context_tokens
        while tokens > least_context_tokens:
            tokens = max(tokens // 2, least_context_tokens)
            yield Loading(tokens, fewest_layers)


@dataclass(frozen=True)
class Files:
    """Names of the files that an engine opens, and of the socket that it listens on, in a folder of its own."""

    folder: Path
    model: str
    mmproj: str | None = None
    printed_ends: tuple[str, ...] = ()  # texts of the model's end tokens that llama.cpp would print

    @property
    def socket(self) -> Path:
        """Only this user can reach it, so that nobody goes around the API key."""
        return self.folder / "engine.sock"


@dataclass(frozen=True)
class Command:
    """What to run, and what to add to the environment."""

    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Engine:
    """How one kind of server is run."""

    command: Callable[[Files, str, Loading, ServingSettings], Command]
    check: Callable[[ServingSettings], Command]  # ends with an error if a flag is unknown
    reserved: Mapping[str, str]  # flag -> what to use in its place
    sign_of_life: str | None  # a path that is answered between two batches; None: it answers nothing while at work
    fewest_layers: int | None  # on the GPU, where memory is short; None: as many as fit
    needs_name: bool = False  # a request must name the model, or the answer names the file


def require_flags(settings: ServingSettings) -> None:
    """Raise SamqError if the engine is missing, or if `engine_flags` has one that it does not know or that SAMQ sets."""
    engine = ENGINES[settings.engine]
    for flag in settings.engine_flags:
        if instead := engine.reserved.get(_name(flag)):
            raise SamqError(f"engine_flags: SAMQ sets {flag} itself; {instead}")
    command = engine.check(settings)
    if not os.access(command.arguments[0], os.X_OK):
        raise SamqError(f"{command.arguments[0]} is missing; run `make setup`, or choose another engine")
    if not settings.engine_flags:
        return
    try:
        done = subprocess.run(
            command.arguments,
            env=environment_of(command),
            capture_output=True,
            text=True,
            timeout=_CHECK_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SamqError(f"cannot ask {settings.engine} about engine_flags ({error}); run `make setup`") from error
    if done.returncode:
        raise SamqError(f"engine_flags: {settings.engine} refuses them: {reason_in(done.stdout + done.stderr)}")


def other_use(settings: ServingSettings) -> str | None:
    """The path that the model is asked at if the flags make it one that does not chat; None if it chats."""
    flags = {_name(flag) for flag, value in settings.engine_flags.items() if value}
    return next((path for path, names in _OTHER_USES.items() if flags & names), None)


def environment_of(command: Command) -> dict[str, str]:
    """The environment of an engine."""
    return _inherited() | command.environment


def _inherited() -> dict[str, str]:
    """This process's variables, without those that would set what the settings do not name, and without the keys."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("LLAMA_ARG_", "LLAMA_API", "SAMQ_API_KEY", "AIP_"))
        and name not in ("MODEL", "CONFIG_FILE")
    }


def _llama_server(files: Files, name: str, loading: Loading, settings: ServingSettings) -> Command:
    keys, values = settings.kv_types
    flags: dict[str, Any] = {
        "model": files.model,
        "alias": name,
        "host": files.socket,
        "parallel": settings.parallel,
        "ctx-size": loading.context_tokens * settings.parallel,
        "cache-type-k": keys.lower(),
        "cache-type-v": values.lower(),
        "gpu-layers": "all" if loading.gpu_layers == -1 else loading.gpu_layers,
        "threads": settings.threads,
        "cache-ram": 0,  # copying an ended answer's state into host memory would stop all other answers meanwhile
        "mmproj": files.mmproj,
        "load-mode": "none",  # it reads all of the file: what happens to that later does not reach the answers
        "metrics": True,
        "slots": True,
        "ui": False,
        "sse-ping-interval": -1,  # the server's comments do that for every engine
        "timeout": 86_400,  # the server has the time limits
        "offline": True,
        "override-kv": _WITHOUT_EOS,
        "reverse-prompt": list(files.printed_ends),  # of the server's own prompts
        "log-verbosity": 4,  # with the layers that it puts on the GPU
    }
    speculation = settings.speculation
    if speculation.kind != "none":
        flags["spec-type"] = _SPECULATION[speculation.kind]
        flags["spec-draft-model"] = speculation.draft_model and speculation.draft_model.absolute()
        flags["spec-draft-n-max"] = None if speculation.kind == "ngram" else speculation.tokens
    given: dict[str, Any] = {_name(flag): value for flag, value in settings.engine_flags.items()}
    if other_use(settings):
        del flags["override-kv"]  # such models read their result off the last token, which is EOS
    elif "override-kv" in given:
        given["override-kv"] = f"{_WITHOUT_EOS},{given['override-kv']}"
    return _llama_server_with(flags | given)


def _name(flag: str) -> str:
    """A flag as a key: `--ctx_size` is `ctx-size`."""
    return flag.lstrip("-").replace("_", "-")


def _llama_server_with(flags: Mapping[str, Any]) -> Command:
    """True stands for the flag alone, False for its negation `--no-FLAG`; None leaves it out, a list repeats it."""
    toolchain = find_toolchain()
    arguments = [str(program(toolchain, "llama-server"))]
    for flag, value in flags.items():
        name = _name(flag)
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            for one in value if isinstance(value, list) else [value]:
                arguments += [f"--{name}", str(one)]
    return Command(arguments, environment(toolchain))


def _check_llama_server(settings: ServingSettings) -> Command:
    command = _llama_server_with(settings.engine_flags)
    return Command([*command.arguments, "--version"], command.environment)  # reads the flags before it


def _llama_cpp_python(files: Files, name: str, loading: Loading, settings: ServingSettings) -> Command:
    keys, values = settings.kv_types
    model: dict[str, Any] = {
        "model": files.model,
        "model_alias": name,
        "n_ctx": loading.context_tokens,
        "n_gpu_layers": -1 if loading.gpu_layers is None else loading.gpu_layers,
        "type_k": _GGML_TYPES[keys],
        "type_v": _GGML_TYPES[values],
        "flash_attn": True,
        "use_mmap": False,
        "logits_all": False,  # with them it keeps the logits of the whole context, a vocabulary for each token
        "verbose": False,
    }
    if not other_use(settings):
        model["kv_overrides"] = [_WITHOUT_EOS]
    if settings.threads:
        model |= {"n_threads": settings.threads, "n_threads_batch": settings.threads}
    config = files.folder / "engine.json"
    config.write_text(json.dumps({"interrupt_requests": False, "models": [model | settings.engine_flags]}))
    served = ["--factory", "llama_cpp.server.app:create_app", "--uds", str(files.socket), "--log-level", "warning"]
    return Command([sys.executable, "-m", "uvicorn", *served], {"CONFIG_FILE": str(config)})


def _check_llama_cpp_python(settings: ServingSettings) -> Command:
    flags = json.dumps({"model": "", **settings.engine_flags})
    program = (
        "import json, sys; from llama_cpp.server.app import ModelSettings; ModelSettings(**json.loads(sys.argv[1]))"
    )
    return Command([sys.executable, "-c", program, flags])


_OWN = "it is the server's: use the settings of `samq serve`"
ENGINES: Mapping[str, Engine] = {
    "llama-server": Engine(
        command=_llama_server,
        check=_check_llama_server,
        reserved={
            **dict.fromkeys(
                ("model", "m", "alias", "a", "host", "port", "metrics", "slots", "ui", "webui", "offline"), _OWN
            ),
            **dict.fromkeys(("api-key", "api-key-file"), "use api_keys"),
            **dict.fromkeys(("cors-origins", "cors-methods", "cors-headers", "cors-credentials"), "use cors_origins"),
            **dict.fromkeys(("timeout", "to"), "use request_timeout_s"),
            **dict.fromkeys(("parallel", "np"), "use slots"),
            **dict.fromkeys(("ctx-size", "c"), "use context_tokens"),
            **dict.fromkeys(("cache-type-k", "ctk", "cache-type-v", "ctv"), "use kv_type and kv_type_v"),
            **dict.fromkeys(("gpu-layers", "n-gpu-layers", "ngl"), "use gpu_layers"),
            **dict.fromkeys(("threads", "t"), "use threads"),
            **dict.fromkeys(("mmproj", "mm", "mmproj-url", "mmu"), "use mmproj"),
            **dict.fromkeys(("spec-type", "spec-draft-model", "model-draft", "md"), "use speculation"),
            **dict.fromkeys(
                ("load-mode", "lm", "mmap", "no-mmap", "mlock"),
                "it reads the whole file before it serves, so that a file altered later is never served",
            ),
            **dict.fromkeys(("no-slots", "log-disable"), "the server learns from it whether the engine works"),
            **dict.fromkeys(("api-prefix", "ssl-key-file", "ssl-cert-file"), "only the server speaks to the engine"),
            **dict.fromkeys(
                ("tools", "media-path", "props", "slot-save-path", "ui-mcp-proxy"), "the server does not pass it on"
            ),
            **dict.fromkeys(
                ("hf-repo", "hf", "hfr", "model-url", "mu", "docker-repo", "dr", "models-dir"), "name a file"
            ),
            "sleep-idle-seconds": "it would read the file again later, which may have been altered by then",
            "sse-ping-interval": "use comment_interval_s",
        },
        sign_of_life="/slots",
        fewest_layers=None,
    ),
    "llama-cpp-python": Engine(
        command=_llama_cpp_python,
        check=_check_llama_cpp_python,
        reserved={
            **dict.fromkeys(("model", "model-alias"), _OWN),
            "n-ctx": "use context_tokens",
            "n-gpu-layers": "use gpu_layers",
            **dict.fromkeys(("n-threads", "n-threads-batch"), "use threads"),
            **dict.fromkeys(("type-k", "type-v"), "use kv_type and kv_type_v"),
            "use-mmap": "it reads the whole file before it serves, so that a file altered later is never served",
        },
        sign_of_life=None,
        fewest_layers=0,
        needs_name=True,
    ),
}
