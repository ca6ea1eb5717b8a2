"""llama.cpp's programs as functions: convert, importance matrix, types of a mixture, quantize.

Each program runs in its own process group with a time limit. It runs in the folder of its output, with file names
relative to that folder: llama.cpp writes the names of its inputs into the GGUF, and absolute ones would make the bytes
depend on the machine.
"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from samq.errors import SamqError, ToolError
from samq.files import GGUF_NAME, IMATRIX_NAME, MMPROJ_NAME
from samq.gguf.audit import accept, provenance_metadata, require_space
from samq.gguf.file import HashedFile, TensorInfo, read_metadata, read_tensors
from samq.gguf.formats import FULL_PRECISION, check_mixture, tensor_bytes
from samq.gguf.imatrix import usable_entries
from samq.gguf.values import first_not_finite
from samq.llamacpp.process import PROGRAM_TIMEOUT_S, run
from samq.llamacpp.reason import reason_in
from samq.llamacpp.tokenizing import stack_bytes
from samq.llamacpp.toolchain import environment, program
from samq.progress import Progress, silent
from samq.records import ModelSource, Plan, QuantizedModel, Substitution, Toolchain

_ADD_EOS = "tokenizer.ggml.add_eos_token"
_STEP = re.compile(r"^\[\s*(\d+)/\s*(\d+)\]\s+(\S+)\s+-")
_ARROW = re.compile(r"-> +[\d.]+ MiB \((\w+)\)")
_FALLBACK = re.compile(
    r"warning: (\S+)\s+- ncols\s+(\d+) not divisible by\s+(\d+) \(required for type\s+(\w+)\).*falling back to\s+(\w+)"
)


def convert(
    source: ModelSource,
    folder: Path,
    toolchain: Toolchain,
    *,
    precision: str = "F16",
    timeout_s: float = PROGRAM_TIMEOUT_S,
) -> Path:
    """Write the model as a full-precision GGUF (`precision`: F16 or BF16) into `folder` and return its path.

    llama.cpp's converter converts a Hugging Face folder; experts that are published in MXFP4 keep it bit for bit. A
    full-precision GGUF is linked or copied. A quantized GGUF is dequantized, which does not restore what its quantization
    lost. Raises SamqError for a model that the converter does not support or whose weights are not finite in that precision,
    and ToolError if a program is missing or fails.
    """
    target, log = folder / GGUF_NAME, folder / "convert.log"
    if source.gguf is None:
        _run_converter(source, ["--outtype", precision.lower()], target, log, toolchain, timeout_s)
    elif _is_full_precision(source.gguf):
        link_or_copy(source.gguf, target)
    else:
        quantize_program = program(toolchain, "llama-quantize")
        command: list[str | Path] = [quantize_program, "--allow-requantize", source.gguf.absolute(), target, precision]
        run(command, log=log, timeout_s=timeout_s, env=environment(toolchain))
    advice = "set model.precision to BF16, or give a GGUF that llama.cpp's converter wrote with --outtype bf16"
    _require_finite(target, source.name, advice)
    return target


def _require_finite(gguf: Path, model: str, advice: str) -> None:
    """Raise SamqError for weights that are no numbers; `advice` says what to do about those that F16 cannot hold."""
    if not (found := first_not_finite(gguf)):
        return
    name, is_infinite = found
    if is_infinite and read_tensors(gguf)[name].type == "F16":
        raise SamqError(f"{name} of {model} has weights over 65504, which F16 cannot hold; {advice}")
    raise SamqError(f"{name} of {model} holds NaN or infinity; get the model again, or choose another one")


def convert_mmproj(
    source: ModelSource,
    folder: Path,
    toolchain: Toolchain,
    *,
    precision: str = "F16",
    timeout_s: float = PROGRAM_TIMEOUT_S,
) -> Path:
    """Write the vision or audio part of a Hugging Face folder (`precision`: F16 or Q8_0) into `folder`; return its path.

    Raises SamqError if the converter does not know that part, or the folder lacks its weights or the scaling of images, and
    ToolError if the converter is missing or fails.
    """
    target = folder / MMPROJ_NAME
    arguments = ["--mmproj", "--outtype", precision.lower()]
    try:
        _run_converter(source, arguments, target, folder / "convert.log", toolchain, timeout_s)
    except ToolError as error:
        if "preprocessor_config" in str(error):
            raise SamqError(
                f"the folder of {source.name} has no preprocessor_config.json that says how images are scaled; copy it there"
            ) from error
        raise
    if not read_tensors(target):
        raise SamqError(
            f"the files of {source.name} have no weights of a vision or audio part; use the text part alone"
        )
    _require_finite(target, source.name, "set model.mmproj to Q8_0")
    return target


def _run_converter(
    source: ModelSource, arguments: list[str], target: Path, log: Path, toolchain: Toolchain, timeout_s: float
) -> None:
    assert source.folder is not None, "a ModelSource has a folder or a GGUF"
    if toolchain.converter is None:
        raise ToolError("convert_hf_to_gguf.py of llama.cpp is missing; run `make setup`, or set SAMQ_LLAMA_CPP")
    command: list[str | Path] = [sys.executable, "-m", "samq.llamacpp.hf_converter", toolchain.converter]
    command += [source.folder.absolute(), "--outfile", target]
    command += [*arguments, "--model-name", source.name.rsplit("/", 1)[-1]]
    is_mmproj = "--mmproj" in arguments
    has_own_package = (toolchain.converter.parent / "gguf-py").is_dir()
    try:
        run(command, log=log, timeout_s=timeout_s, env=None if has_own_package else {"NO_LOCAL_GGUF": "1"})
    except ToolError as error:
        output = log.read_text(errors="replace")
        if "BPE pre-tokenizer was not recognized" in output:
            raise SamqError(
                f"llama.cpp's converter does not know the tokenizer of {source.name}; convert the model with a llama.cpp "
                "that does, and give the GGUF with the folder as hf_folder"
            ) from error
        if "assert max(tokenizer.vocab.values()) < vocab_size" in output:
            raise SamqError(
                f"the tokenizer of {source.name} has tokens that its embedding has no row for (vocab_size in config.json); "
                "resize the embedding to the tokenizer, or remove the added tokens"
            ) from error
        if missing := re.match(r"KeyError: '(\w+)' in `.*hparams", reason_in(output)):
            raise SamqError(
                f"llama.cpp's converter does not find {missing[1]} in the configuration of {source.name}; add it to config.json, "
                "or, if it is there, convert the model elsewhere and give the GGUF with the folder as hf_folder"
            ) from error
        if unsupported := re.search(r"Model (\S+) is not supported", output):
            whole = ("", "choose another model")
            part, advice = ("the vision or audio part of ", "use the text part alone") if is_mmproj else whole
            raise SamqError(
                f"llama.cpp's converter does not support {part}{unsupported[1]} ({source.name}); {advice}"
            ) from error
        raise


def link_or_copy(path: Path, target: Path) -> None:
    """Make `target` a hard link to the file that `path` leads to, or a copy where the file systems do not allow that."""
    path = path.resolve()
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def _is_full_precision(gguf: Path) -> bool:
    return all(tensor.type in FULL_PRECISION for tensor in read_tensors(gguf).values())


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
    if the text has a run that is too long to tokenize, and ToolError if the program fails or does not write a file.
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


def mixture_types(
    gguf: Path,
    mixture: str,
    toolchain: Toolchain,
    *,
    imatrix: Path | None = None,
    pure: bool = False,
) -> tuple[dict[str, str], dict[str, Substitution]]:
    """Ask llama-quantize (`--dry-run`) which type it would give each tensor in this mixture.

    Returns (tensor -> type for every tensor of the file, tensor -> substitution where the row length rules a type out).
    """
    command: list[str | Path] = [program(toolchain, "llama-quantize"), "--dry-run", *(["--pure"] if pure else [])]
    command += ["--imatrix", imatrix.absolute()] if imatrix else []
    with tempfile.TemporaryDirectory() as scratch:
        output = run(
            [*command, gguf.absolute(), check_mixture(mixture)],
            log=Path(scratch) / "dry-run.log",
            timeout_s=600,
            env=environment(toolchain),
        )
    types = {name: tensor.type for name, tensor in read_tensors(gguf).items()}
    substitutions = {}
    for line in output.splitlines():
        if step := _STEP.match(line):
            if arrow := _ARROW.search(line):
                types[step[3]] = arrow[1].upper()
        elif warning := _FALLBACK.search(line):
            name, columns, block, requested, used = warning.groups()
            reason = f"rows of {columns} are not a multiple of {block}"
            substitutions[name] = Substitution(requested=requested.upper(), used=used.upper(), reason=reason)
    return types, substitutions


def quantizable_tensors(gguf: Path, toolchain: Toolchain) -> dict[str, TensorInfo]:
    """Ask llama-quantize which tensors of the file it quantizes; the others keep their type in every plan."""
    types, _ = mixture_types(gguf, "Q8_0", toolchain, pure=True)
    return {name: tensor for name, tensor in read_tensors(gguf).items() if types[name] != tensor.type}


def quantize(
    gguf: Path,
    plan: Plan,
    folder: Path,
    toolchain: Toolchain,
    *,
    provenance: dict[str, str],
    imatrix: HashedFile | None = None,
    timeout_s: float = PROGRAM_TIMEOUT_S,
    progress: Progress = silent,
) -> QuantizedModel:
    """Write the plan's GGUF into `folder` with llama-quantize, audit it and describe it.

    `provenance` is added to the metadata as `samq.<key>` (at most 127 bytes a value, llama.cpp's limit). llama-quantize
    rounds each weight to its nearest value, also for a plan of compensated rounding, which
    `samq.quantization.compensation` then applies. Raises SamqError if the disk is too full or the importance matrix is not
    the plan's or cannot be used (`samq.gguf.imatrix`), and ToolError if llama-quantize fails or its file is not the plan's.
    """
    check_imatrix(plan, imatrix)
    if imatrix:
        usable_entries(imatrix.path, {name: info for name, info in read_tensors(gguf).items() if name in plan.types})
    require_space(folder, plan.name, int(1.02 * plan.tensor_bytes) + 64 * 2**20)
    partial = folder / f"{GGUF_NAME}.partial"
    types_file = folder / "tensor-types.txt"
    types_file.write_text("".join(f"^{re.escape(name)}$={kind.lower()}\n" for name, kind in plan.types.items()))
    metadata = provenance_metadata(plan, provenance)
    command: list[str | Path] = [
        program(toolchain, "llama-quantize"),
        "--allow-requantize",
        "--tensor-type-file",
        types_file.name,
    ]
    if imatrix:
        shutil.copyfile(imatrix.path, folder / IMATRIX_NAME)
        command += ["--imatrix", IMATRIX_NAME]
    for key, value in metadata.items():
        if len(value.encode()) > 127:
            raise SamqError(f"provenance {key} is longer than 127 bytes; shorten {value!r}")
        command += ["--override-kv", f"{key}=str:{value}"]

    def on_line(line: str) -> None:
        if step := _STEP.match(line):
            progress(int(step[1]), int(step[2]))

    run(
        [*command, gguf.absolute(), partial.name, plan.mixture],
        log=folder / "quantize.log",
        timeout_s=timeout_s,
        cwd=folder,
        env=environment(toolchain),
        on_line=on_line,
    )
    (folder / IMATRIX_NAME).unlink(missing_ok=True)
    return accept(partial, plan, metadata, gguf)


def check_imatrix(plan: Plan, imatrix: HashedFile | None) -> None:
    """Raise SamqError unless the importance matrix, or its absence, is what the plan's types and costs are for."""
    given, planned = imatrix.sha256 if imatrix else None, plan.imatrix_sha256
    if given != planned:
        how = f"with importance matrix {planned[:12]}" if planned else "without importance matrix"
        other = given[:12] if given else "none"
        advice = "give that one" if planned else "leave it out"
        raise SamqError(f"plan {plan.name} was made {how} and {other} is given; {advice}, or plan again")


def planned_bytes(tensors: dict[str, TensorInfo], types: dict[str, str]) -> int:
    """Bytes of all tensors if those in `types` get the type given there and the others keep theirs."""
    return sum(tensor_bytes(types.get(name, tensor.type), tensor.shape) for name, tensor in tensors.items())
