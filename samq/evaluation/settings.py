"""What an evaluation is asked to do: its settings, and the request that a child process reads."""

import re
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from samq.records import Record


def metric_part(name: str) -> str:
    """A name that can be part of a metric's: `pass@1` becomes `pass_at_1`, a task file its name."""
    name = Path(name).stem if name.endswith((".yaml", ".yml")) else name
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name.replace("@", "_at_"))


def benchmark_key(task: str) -> str:
    """What a task's figures have in common, or the reason why there are none: `eval/TASK`."""
    return f"eval/{metric_part(task)}"


class EvaluationSettings(BaseModel):
    """How candidates are measured: the same for all that are compared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    context_tokens: int = Field(default=512, ge=16, description="length of a chunk of held-out text, in tokens")
    score_from: int | None = Field(
        default=None,
        ge=0,
        description="first position of a chunk that is scored; None: half of it, as llama-perplexity has it",
    )
    chunks: int | None = Field(default=16, ge=1, description="chunks that are scored, from the first; None: all")
    json_prompts: int | None = Field(
        default=None, ge=0, description="JSON prompts asked, from the first; None: all; 0: JSON is not measured"
    )
    json_tokens: int = Field(default=96, ge=8, description="longest JSON answer, in tokens")
    speed_requests: int = Field(default=10, ge=0, description="requests that are timed; 0: speed is not measured")
    speed_warmup: int = Field(default=2, ge=0, description="requests before those that are timed")
    speed_prompt_tokens: int = Field(default=64, ge=2, description="prompt of a timed request, in tokens")
    speed_generated_tokens: int = Field(default=32, ge=2, description="answer of a timed request, in tokens")
    vram_context_tokens: int = Field(default=4096, ge=1, description="context length that memory is predicted for")
    kv_type: Literal["F16", "Q8_0", "Q4_0"] = Field(
        default="F16", description="type of the candidates' KV cache in every measurement; the baseline's is always F16"
    )
    threads: int | None = Field(default=None, ge=1, description="threads of llama.cpp; None: one a physical core")
    gpu_layers: int | None = Field(
        default=None,
        ge=-1,
        description="layers on the GPU, -1: all; None: as many as fit, by llama.cpp's own plan",
    )

    @property
    def first_scored(self) -> int:
        """First position of a chunk whose prediction is scored."""
        return self.context_tokens // 2 if self.score_from is None else self.score_from

    @property
    def scored_per_chunk(self) -> int:
        """Scored positions of a chunk: from the first to the last but one, whose next token the chunk still holds."""
        return self.context_tokens - 1 - self.first_scored

    @model_validator(mode="after")
    def _scores_something(self) -> "EvaluationSettings":
        if self.scored_per_chunk < 1:
            raise ValueError(f"score_from must be under context_tokens - 1 ({self.context_tokens - 1})")
        return self


class BenchmarkSettings(BaseModel):
    """Which lm-eval tasks candidates are asked, and how: the same for all that are compared."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    # A task is identified by what it holds, not by its name or where it lies.
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"tasks", "task_folders", "run_code"})

    tasks: tuple[str, ...] = Field(
        default=("samq_hellaswag", "samq_gsm8k", "samq_truthfulqa_mc1"),
        description="names of tasks or groups: SAMQ's (samq_...), lm-eval's own, those of task_folders; or .yaml files",
    )
    task_folders: tuple[Path, ...] = Field(default=(), description="folders whose .yaml files are more tasks")
    few_shots: int | None = Field(
        default=None, ge=0, description="worked examples before an item; None: the task's own"
    )
    limit: int | None = Field(default=None, ge=1, description="items of each task, from the first; None: all")
    chat_template: bool = Field(default=False, description="put items as turns of the model's chat template")
    run_code: bool = Field(
        default=False,
        description="allow tasks that run the code that the model writes: SAMQ's confine it, lm-eval's own do not",
    )
    seed: int | None = Field(default=None, ge=0, description="of the choice of examples; None: lm-eval's own seeds")
    context_tokens: int | None = Field(
        default=None,
        ge=64,
        description="longest prompt with its answer, of which longer ones lose the start; None: what the model was trained for",
    )


class GgufRequest(Record):
    """What a child process does with one GGUF."""

    gguf: Path
    sha256: str = Field(description="SHA-256 of that file")
    output: Path = Field(description="folder that gets the record and the tables")
    settings: EvaluationSettings = EvaluationSettings()


class BaselineRequest(GgufRequest):
    """Compute the full-precision model's logits on the held-out tokens, once for all candidates."""

    SCHEMA: ClassVar[str] = "samq.baseline-request/1"

    tokens: Path = Field(description="the held-out TokenBatch, as samq.data.tokens saves it (npz)")


class EvaluationRequest(GgufRequest):
    """Measure one candidate."""

    SCHEMA: ClassVar[str] = "samq.evaluation-request/1"

    name: str = Field(description="the candidate's name in reports")
    tokens: Path = Field(description="the held-out TokenBatch, as samq.data.tokens saves it (npz)")
    baseline: Path | None = Field(default=None, description="folder of a baseline; None: fidelity is not measured")


class BenchmarkRequest(GgufRequest):
    """Put lm-eval's tasks to one candidate; of the settings only KV type, threads and GPU layers count."""

    SCHEMA: ClassVar[str] = "samq.benchmark-request/1"

    name: str = Field(description="the candidate's name in reports")
    benchmarks: BenchmarkSettings = BenchmarkSettings()
