"""A causal LM in full precision, loaded into torch."""

import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from samq.errors import SamqError
from samq.gguf.file import read_metadata
from samq.gguf.header import LazyReader
from samq.progress import Progress, silent
from samq.records import ModelSource
from samq.sensitivity import gguf_config
from samq.sensitivity.as_llama_cpp import compute_as_llama_cpp
from samq.sensitivity.blocks import comes_apart, main_device
from samq.sensitivity.checkpoint import describe_source, weight_files
from samq.sensitivity.memory import return_freed_memory
from samq.sensitivity.offloading import has_offloaded, is_offloaded
from samq.sensitivity.placement import LEAST_SHARE, WHOLE_SHARE, not_read, offload_folder, placement, take_over
from samq.sensitivity.published_types import dequantize_at_load

# `set_tqdm_hook` does not reach transformers' bar over a GGUF's tensors, so that bar is made like the others.
modeling_gguf_pytorch_utils.tqdm = transformers_logging.tqdm  # type: ignore[attr-defined]
log = logging.getLogger("samq.model")
_loading = threading.Lock()  # loading changes transformers and gguf, which is visible to all threads
_ABOUT_DEVICE = re.compile(r"device type|CUDA|NVIDIA|out of memory")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer from the source's folder, or else from its GGUF; raises SamqError if that fails."""
    with _loading, _gguf_read_once():
        return _tokenizer(source)


def _tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    folder, from_gguf = _places(source)
    with _transformers_errors(f"the tokenizer of {source.name}", source):
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, **({} if source.folder is not None else from_gguf)
        )


def load_model(
    source: ModelSource,
    dtype: str = "float32",
    device: str = "auto",
    progress: Progress = silent,
    memory_limit: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model, in eval mode, and its tokenizer, without downloading anything.

    Args:
        source: from `describe_source`. The weights come from its GGUF if it has one; the configuration and the tokenizer
            come from its folder if it has one.
        dtype: float32, bfloat16 or float16.
        device: a torch device, or auto: all GPUs if there are any, else cpu.
        progress: told of the tensors that are read from a GGUF, and then of those that the model has.
        memory_limit: bytes of the device's memory for the model and what is measured; None for what is free. Where it is less
            than twice the model, its matrices stay on disk, or a GGUF's blocks in the host's memory
            (`samq.sensitivity.offloading`). A model that does not run a block at a time needs less to be loaded whole.

    Raises:
        SamqError: the dtype is unknown, or the model cannot be loaded on the device.
    """
    if dtype not in DTYPES:
        raise SamqError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    loaded = _load(source, dtype, device, progress, memory_limit, WHOLE_SHARE)
    if has_offloaded(loaded[0]) and not comes_apart(loaded[0]):
        del loaded
        loaded = _load(source, dtype, device, progress, memory_limit, LEAST_SHARE)
    return loaded


def _load(
    source: ModelSource, dtype: str, device: str, progress: Progress, memory_limit: int | None, share: float
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    place = ("auto" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    folder, from_gguf = _places(source)
    if not from_gguf:
        weight_files(folder)  # transformers would find a damaged file late, and report it less clearly
    gguf_alone = source.gguf if source.folder is None else None  # the configuration comes from it, too
    what = f"{source.name} as {dtype} on {place}"
    with _loading, _gguf_read_once():
        with (
            _transformers_errors(what, source),
            _bars_told_to(progress),
            _without_known_warnings(),
        ):
            config = _configuration(source)
            model_class = model_class_of(config)
            with torch.device("meta"):
                skeleton = model_class.from_config(config, dtype=DTYPES[dtype])
            places = placement(skeleton, place, "cpu" if from_gguf else "disk", memory_limit, share)
            safetensors = not from_gguf and all(file.suffix == ".safetensors" for file in weight_files(folder))
            with not_read(skeleton, places) if safetensors else nullcontext():
                loaded: Any = model_class.from_pretrained(
                    folder,
                    config=config,
                    dtype=DTYPES[dtype],
                    device_map=places,
                    offload_folder=offload_folder() if isinstance(places, dict) else None,
                    local_files_only=True,
                    output_loading_info=True,
                    **from_gguf,
                )
            model, info = loaded[0].eval(), loaded[1]
            if isinstance(places, dict):
                take_over(model)
                log.info(
                    "%s does not fit the memory of %s; its weights wait elsewhere until they are used",
                    source.name,
                    place,
                )
                if main_device(model).type == "cpu":
                    return_freed_memory()
            if gguf_alone:
                gguf_config.scale_frequencies(model, gguf_alone)
            _keep_text_part(model)
            compute_as_llama_cpp(model)
        tokenizer = _tokenizer(source)
    kept = model.state_dict().keys()
    if missing := [name for name in info["missing_keys"] if name in kept]:  # only warned of, and left random
        advice = "give the model's Hugging Face folder" if source.gguf else "download it again"
        raise SamqError(f"{source.name} has no weights for {min(missing)}; {advice}")
    if any(parameter.is_meta and not is_offloaded(parameter) for parameter in model.parameters()):
        raise SamqError(f"{source.name} as {dtype} does not fit on the GPUs; use bfloat16, more GPUs, or the CPU")
    return model, tokenizer


def _configuration(source: ModelSource) -> Any:
    """The configuration of what is to be loaded: the whole model of a folder, or the text part that a GGUF holds."""
    folder, from_gguf = _places(source)
    config = AutoConfig.from_pretrained(
        folder, local_files_only=True, **({} if source.folder is not None else from_gguf)
    )
    if source.gguf is None:
        dequantize_at_load(config)
        return config
    return (
        config.get_text_config() if source.folder is not None else gguf_config.completed_from_gguf(config, source.gguf)
    )


def model_class_of(config: Any) -> Any:
    """The class to load a model of this configuration with: of causal LMs if it is one, else of multimodal ones."""
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForMultimodalLM


def _keep_text_part(model: PreTrainedModel) -> None:
    """Drop from a multimodal model what only images and sound pass through."""
    text = model.config.get_text_config()
    if text is model.config:
        return
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0  # Gemma 4 computes with it even where no token stands for an image
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    for parent in [module for module in model.modules() if module is not decoder and decoder in module.modules()]:
        for name, child in parent.named_children():
            parts: set[nn.Module] = set(child.modules())
            # Gemma 3n looks every token up in the tables of its other vocabularies.
            if decoder not in parts and head not in parts and not hasattr(child, "vocab_offset"):
                setattr(parent, name, None)


def _places(source: ModelSource) -> tuple[Path, dict[str, str]]:
    """The folder to load from, and the argument that names the GGUF to transformers."""
    if source.gguf is not None:
        return source.folder or source.gguf.parent, {"gguf_file": str(source.gguf)}
    if source.folder is None:
        raise SamqError(f"{source.name} has neither a folder nor a GGUF on this machine; describe the source again")
    return source.folder, {}


@contextmanager
def _bars_told_to(progress: Progress) -> Iterator[None]:
    """Send the counts of transformers' bars to `progress`. The bars themselves would draw over SAMQ's and spoil log files."""

    def tell(_draw: Callable[..., Any], arguments: tuple[Any, ...], _options: dict[str, Any]) -> Iterator[Any]:
        (items,) = arguments
        return _counted(items, progress)

    before = transformers_logging.set_tqdm_hook(tell)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)


@contextmanager
def _without_known_warnings() -> Iterator[None]:
    """Leave out of the log that the file has weights of no use to the model (a vision part's, MTP's), or that some wait."""

    def is_of_use(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "LOAD REPORT" not in message or any(word in message for word in ("MISSING", "MISMATCH", "CONVERSION"))

    def is_not_of_offloading(record: logging.LogRecord) -> bool:
        return "on the meta device because they were offloaded" not in record.getMessage()

    filters = {"transformers.modeling_utils": is_of_use, "accelerate.big_modeling": is_not_of_offloading}
    for name, decide in filters.items():
        logging.getLogger(name).addFilter(decide)
    try:
        yield
    finally:
        for name, decide in filters.items():
            logging.getLogger(name).removeFilter(decide)


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Let transformers open a GGUF once a model, not three times, and build its map of names once, not once a module."""
    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    # not `open_gguf`: a reader that outlives the loading keeps in memory what was read through it
    shared = {"GGUFReader": lru_cache(LazyReader), "get_tensor_name_map": lru_cache(gguf.get_tensor_name_map)}
    try:
        for name, function in shared.items():
            setattr(gguf, name, function)
        yield
    finally:
        for name, function in originals.items():
            setattr(gguf, name, function)


def _counted(items: Any, progress: Progress) -> Iterator[Any]:
    for done, item in enumerate(items):
        progress(done, len(items))
        yield item
    progress(len(items), len(items))


@contextmanager
def _transformers_errors(what: str, source: ModelSource) -> Iterator[None]:
    """Raise SamqError with the first line of whatever error transformers or torch raises.

    transformers reads few architectures from a GGUF, and its own words about the others are of no use: the advice is to give
    the folder.
    """
    try:
        yield
    except (OSError, TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
        cause = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
        if source.gguf is None or _ABOUT_DEVICE.search(cause):
            raise SamqError(f"transformers cannot load {what} ({cause}); check its files and the device") from error
        architecture = read_metadata(source.gguf).get("general.architecture", "unknown")
        raise SamqError(
            f"transformers cannot read {what} from a GGUF of the architecture {architecture}; give the model's Hugging Face "
            f"folder or hub id as the model instead (`samq compensate`: --model); cause: {shorten(cause, 120)}"
        ) from error


def write_hf_folder(gguf: Path, folder: Path) -> Path:
    """Write a full-precision GGUF's model as an HF folder for llama.cpp's converter, and return the folder.

    transformers refuses `save_pretrained` for a model that it loaded from a GGUF, so the weights are saved directly.
    """
    source = describe_source(gguf)
    model, tokenizer = load_model(source, device="cpu")
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    del model.config.quantization_config  # it names the GGUF, and the weights are plain float32 now
    tied = set(model.all_tied_weights_keys)  # the copies, since safetensors does not store a tensor twice
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
