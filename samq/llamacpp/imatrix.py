"""Measures an importance matrix with llama-imatrix."""

from pathlib import Path

from samq.errors import ToolError
from samq.files import IMATRIX_NAME
from samq.gguf.file import read_metadata
from samq.llamacpp.process import PROGRAM_TIMEOUT_S, run
from samq.llamacpp.reason import reason_in
from samq.llamacpp.tokenizing import stack_bytes
from samq.llamacpp.toolchain import environment, program
from samq.records import Toolchain

_ADD_EOS = "tokenizer.ggml.add_eos_token"


def measure_imatrix(
    gguf: Path,
    text: str,
    folder: Path,
    toolchain: Toolchain,
    *,
    context_tokens: int = 512,
    threads: int | None = None,
    timeout_s: float = PROGRAM_TIMEOUT_S,
) -> Path:
    """Run llama-imatrix over `text` in contexts of `context_tokens`, and return the path of the importance matrix.

    llama-imatrix measures the output tensor only if it has weights of its own, and not the embedding's. Raises TextError
    if the text has a run that is too long to tokenize. Raises ToolError if the program fails or does not write a file.
    """
    metadata = read_metadata(gguf)
    stack = stack_bytes(text, *(str(metadata.get(f"tokenizer.ggml.{key}", "")) for key in ("model", "pre")))
    (folder / "calibration.txt").write_text(text)
    command: list[str | Path] = [
        program(toolchain, "llama-imatrix"),
        "-m",
        gguf.absolute(),
        "-f",
        "calibration.txt",
        "-o",
        IMATRIX_NAME,
    ]
    command += ["--process-output", "--no-ppl", "-c", str(context_tokens), "-b", str(context_tokens)]
    command += ["-t", str(threads)] if threads else []
    if metadata.get(_ADD_EOS):  # llama-imatrix refuses such a model, although the text is one stream without ends
        command += ["--override-kv", f"{_ADD_EOS}=bool:false"]
    log = folder / "imatrix.log"
    output = run(command, log=log, timeout_s=timeout_s, cwd=folder, env=environment(toolchain), stack=stack)
    (folder / "calibration.txt").unlink()
    if not (folder / IMATRIX_NAME).is_file():
        raise ToolError(f"llama-imatrix wrote nothing: {reason_in(output)} (log: {log}); give it more calibration text")
    return folder / IMATRIX_NAME
