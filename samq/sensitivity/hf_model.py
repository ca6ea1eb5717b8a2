"""A causal LM in full precision: its description by content, the check of its files, and loading into torch."""

import importlib.util
import json
import re
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import torch
from gguf import LlamaFileType
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from samq import __version__
from samq.data.hub import bytes_told_to, is_unreachable
from samq.errors import SamqError, UnreachableError
from samq.gguf import rescaling
from samq.gguf.file import file_sha256, open_gguf, read_metadata
from samq.gguf.header import LazyReader
from samq.home import store_folder
from samq.progress import Progress, silent
from samq.records import ModelSource, digest_of
from samq.sensitivity import gguf_config
from samq.sensitivity.as_llama_cpp import compute_as_llama_cpp
from samq.store import Store

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Top-level files only: some repositories keep the same weights in other formats in folders.
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
TORCH_FILES = ["pytorch_model*.bin"]  # downloaded if a repository does not have safetensors
TOKENIZER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.model",
)
# `set_tqdm_hook` does not reach transformers' bar over a GGUF's tensors, so that bar is made like the others.
modeling_gguf_pytorch_utils.tqdm = transformers_logging.tqdm  # type: ignore[attr-defined]
_loading = threading.Lock()  # loading changes transformers and gguf, which is visible to all threads
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def describe_source(
    model: str | Path, revision: str | None = None, hf_folder: Path | None = None, progress: Progress = silent
) -> ModelSource:
    """Describe a model by the contents of its files.

    Args:
        model: an HF folder; a GGUF file, also one inside an installed package as package:<module>/<file>; or a hub id,
            whose files are then downloaded. rescaled:<GGUF> is that GGUF's model in another basis (`samq.gguf.rescaling`).
        revision: branch, tag or commit of a hub id.
        hf_folder: the folder to read a GGUF's configuration and tokenizer from, instead of the GGUF.
        progress: told of the bytes that are downloaded.

    Raises:
        UnreachableError: the hub does not answer.
        SamqError: a file is missing or cut short, or the model is not a causal LM that transformers knows.
    """
    name = str(model).removeprefix("rescaled:")
    path = _in_package(name) if name.startswith("package:") else Path(name)
    if name != str(model):
        path = _rescaled(path)
    if path.suffix == ".gguf":
        return _describe_gguf(path, hf_folder)
    if hf_folder is not None:
        raise SamqError(f"{model} is not a GGUF and has its own tokenizer; leave the other folder {hf_folder} out")
    commit = None
    if not path.exists() and HUB_ID.fullmatch(str(model)):
        path = _download(str(model), revision, progress)
        commit = path.name  # a snapshot's folder is named after its commit
    _check_architecture(read_config(path), path)
    return ModelSource(
        name=str(model) if commit else path.resolve().name,
        revision=commit,
        weights_digest=_digest(weight_files(path)),
        tokenizer_digest=_digest(_tokenizer_files(path)),
        folder=path.resolve(),
    )


def _describe_gguf(path: Path, folder: Path | None) -> ModelSource:
    open_gguf(path)
    content = file_sha256(path)
    if folder is not None:
        _check_architecture(read_config(folder), folder)
    return ModelSource(
        name=path.stem,
        weights_digest=content,
        tokenizer_digest=_digest(_tokenizer_files(folder)) if folder is not None else content,
        folder=folder.resolve() if folder is not None else None,
        gguf=path.resolve(),
    )


def _in_package(name: str) -> Path:
    """The path behind package:<module>/<file>."""
    module, _, file = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or spec.origin is None:
        raise SamqError(f"{name}: there is no package {module}; install it, or write package:<module>/<file>")
    return Path(spec.origin).parent / file


def _rescaled(gguf: Path) -> Path:
    """The GGUF's model in another basis, from the store: written there the first time."""
    if gguf.suffix != ".gguf":
        raise SamqError(f"{gguf} is not a GGUF, and only a GGUF can be rescaled; leave rescaled: out")
    file_type = LlamaFileType(read_metadata(gguf).get("general.file_type", LlamaFileType.MOSTLY_F16))
    name = f"{gguf.stem.removesuffix(file_type.name.replace('MOSTLY_', '.'))}-rescaled.gguf"
    packages = {package: version(package) for package in ("gguf", "numpy")}
    key = digest_of({"version": rescaling.VERSION, "packages": packages, "name": name, "gguf": file_sha256(gguf)})
    store = Store(store_folder())
    if not store.find("rescale", key):
        with store.publish("rescale", key, {"samq": __version__, **packages}) as folder:
            rescaling.write_rescaled(gguf, folder / name)
    artifact = store.find("rescale", key)
    assert artifact is not None, "an artifact just published is there"
    return artifact.path(name)


def _tokenizer_files(folder: Path) -> list[Path]:
    return sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)})


def _digest(files: Iterable[Path]) -> str:
    return digest_of({file.name: file_sha256(file) for file in files})


def _download(hub_id: str, revision: str | None, progress: Progress) -> Path:
    def fetch(revision: str | None, files: list[str]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=files,
                ignore_patterns=["*/*"],
                tqdm_class=bytes_told_to(progress),
            )
        )

    try:
        folder = fetch(revision, HUB_FILES)
        return folder if any(folder.glob("*.safetensors")) else fetch(folder.name, HUB_FILES + TORCH_FILES)
    except Exception as error:  # huggingface_hub, httpx and hf_xet raise errors of their own
        reason = str(error).strip().split("\n")[0]
        if is_unreachable(error):
            raise UnreachableError(
                f"there is no folder {hub_id}, and the hub did not answer ({type(error).__name__}: {reason}); check the "
                "network and try again, or give a folder"
            ) from error
        raise SamqError(
            f"there is no folder {hub_id}, and the hub did not give a model of that name ({type(error).__name__}: "
            f"{reason}); check the name and the network, or give a folder"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read the folder's config.json; raises SamqError if it is missing or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise SamqError(f"{folder} is not a model folder: it has no config.json; give a Hugging Face model folder")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise SamqError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(config, dict):
        raise SamqError(f"{path} does not hold a JSON object; copy it again")
    return config


def _check_architecture(config: dict[str, Any], folder: Path) -> None:
    names = config.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type", ""))]
    if names[0] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise SamqError(
            f"{folder} is a {names[0] or config.get('model_type')}, not a causal language model that transformers "
            "knows; give a ...ForCausalLM model"
        )
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise SamqError(f"{folder} is quantized already ({method}); give the full-precision model it was made from")


def weight_files(folder: Path) -> list[Path]:
    """The weight files of an HF folder, sorted; raises SamqError if one is missing or cut short.

    safetensors take precedence over torch's own format, as in transformers and in llama.cpp's converter.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        whole = folder / f"{stem}.{suffix}"
        if index.is_file():
            files = _shards(index)
        elif whole.is_file():
            files = [whole]
        else:
            continue
        for file in files:
            if suffix == "safetensors":
                _check_safetensors(file)
        return files
    raise SamqError(
        f"{folder} has no weights (model.safetensors or pytorch_model.bin, or shards of one with an index); give a folder "
        "with weights"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SamqError(f"{index} is not an index of weight files; copy it again") from error
    for name in names:
        if not (index.parent / name).is_file():
            raise SamqError(f"{index.parent} lacks {name}, which {index.name} names; download the model again")
    return [index.parent / name for name in names]


def _check_safetensors(path: Path) -> None:
    """Raise SamqError if the file's size is not what its header promises; takes a second for a model of any size."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, size)))
        header.pop("__metadata__", None)
        promised = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SamqError(f"{path} has a damaged header; download that file again") from error
    if size != promised:
        raise SamqError(f"{path} has {size} bytes where its header promises {promised}; download that file again")


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer from the source's folder, or else from its GGUF; raises SamqError if that fails."""
    with _loading, _gguf_read_once():
        return _tokenizer(source)


def _tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    folder, from_gguf = _places(source)
    with _transformers_errors(f"the tokenizer of {source.name}"):
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, **({} if source.folder is not None else from_gguf)
        )


def load_model(
    source: ModelSource, dtype: str = "float32", device: str = "auto", progress: Progress = silent
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model, in eval mode, and its tokenizer, without downloading anything.

    Args:
        source: from `describe_source`. The weights come from its GGUF if it has one; the configuration and the tokenizer
            come from its folder if it has one.
        dtype: float32, bfloat16 or float16.
        device: a torch device, or auto: all GPUs if there are any, else cpu.
        progress: told of the tensors that are read from a GGUF, and then of those that the model has.

    Raises:
        SamqError: the dtype is unknown, or the model cannot be loaded on the device.
    """
    if dtype not in DTYPES:
        raise SamqError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    place = ("auto" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    folder, from_gguf = _places(source)
    if not from_gguf:
        weight_files(folder)  # transformers would find a damaged file late, and report it less clearly
    gguf_alone = source.gguf if source.folder is None else None  # the configuration comes from it, too
    what = f"{source.name} as {dtype} on {place}"
    with _loading, _gguf_read_once():
        with _transformers_errors(what), _bars_told_to(progress):
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, **({} if source.folder is not None else from_gguf)
            )
            if gguf_alone:
                gguf_config.complete(config, gguf_alone)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=DTYPES[dtype],
                device_map=place,
                local_files_only=True,
                output_loading_info=True,
                **from_gguf,
            )
            model, info = loaded[0].eval(), loaded[1]
            if gguf_alone:
                gguf_config.scale_frequencies(model, gguf_alone)
            compute_as_llama_cpp(model)
        tokenizer = _tokenizer(source)
    if info["missing_keys"]:  # transformers only warns, and leaves these weights random
        advice = "give the model's Hugging Face folder" if source.gguf else "download it again"
        raise SamqError(f"{source.name} has no weights for {min(info['missing_keys'])}; {advice}")
    if any(
        parameter.is_meta for parameter in model.parameters()
    ):  # left on the host or on disk, out of autograd's reach
        raise SamqError(f"{source.name} as {dtype} does not fit on the GPUs; use bfloat16, more GPUs, or the CPU")
    return model, tokenizer


def compute_device(device: str) -> str:
    """The torch device for work without a model: for `auto` the first GPU, or the CPU if there is none."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


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
def _transformers_errors(what: str) -> Iterator[None]:
    """Raise SamqError with the first line of whatever error transformers or torch raises."""
    try:
        yield
    except (OSError, TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        folder, files = "give the model's Hugging Face folder in place of the GGUF", "check its files and the device"
        advice = folder if "gguf" in reason.lower() else files  # transformers reads few architectures from GGUFs
        raise SamqError(f"transformers cannot load {what} ({type(error).__name__}: {reason}); {advice}") from error


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
