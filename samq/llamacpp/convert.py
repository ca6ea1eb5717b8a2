"""Writes a model as a full-precision GGUF, by llama.cpp's converter, and its vision or audio part."""

import logging
import os
import re
import shutil
import sys
from pathlib import Path

from samq.errors import SamqError, ToolError
from samq.files import GGUF_NAME, MMPROJ_NAME
from samq.gguf.file import read_tensors
from samq.gguf.formats import FULL_PRECISION
from samq.gguf.values import first_not_finite
from samq.llamacpp.prediction_layers import left_out
from samq.llamacpp.process import PROGRAM_TIMEOUT_S, run
from samq.llamacpp.reason import reason_in
from samq.llamacpp.toolchain import environment, program
from samq.records import ModelSource, Toolchain

log = logging.getLogger(__name__)


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
    lost. The log warns of layers for multi-token prediction that the GGUF lacks. Raises SamqError for a model that the
    converter does not support or whose weights are not finite in that precision. Raises ToolError if a program is missing or
    fails.
    """
    target, log_path = folder / GGUF_NAME, folder / "convert.log"
    if source.gguf is None:
        _run_converter(source, ["--outtype", precision.lower()], target, log_path, toolchain, timeout_s)
    elif _is_full_precision(source.gguf):
        link_or_copy(source.gguf, target)
    else:
        quantize_program = program(toolchain, "llama-quantize")
        command: list[str | Path] = [quantize_program, "--allow-requantize", source.gguf.absolute(), target, precision]
        run(command, log=log_path, timeout_s=timeout_s, env=environment(toolchain))
    advice = "set model.precision to BF16, or give a GGUF that llama.cpp's converter wrote with --outtype bf16"
    _require_finite(target, source.name, advice)
    if source.folder is not None and (lack := left_out(source.folder, read_tensors(target), source.gguf is None)):
        log.warning("the GGUF of %s %s", source.name, lack)
    return target


def _require_finite(gguf: Path, model: str, advice: str) -> None:
    """Raise SamqError for weights that are no numbers; `advice` says what to do about those that F16 cannot hold."""
    if not (not_finite := first_not_finite(gguf)):
        return
    name, is_infinite = not_finite
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

    Raises SamqError if the converter does not know that part, or the folder lacks its weights or the scaling of images. Raises
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
    source: ModelSource, arguments: list[str], target: Path, log_path: Path, toolchain: Toolchain, timeout_s: float
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
        run(command, log=log_path, timeout_s=timeout_s, env=None if has_own_package else {"NO_LOCAL_GGUF": "1"})
    except ToolError as error:
        output = log_path.read_text(errors="replace")
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
