"""A causal LM in full precision as files: its description by content, and the check that they are whole."""

import importlib.util
import json
import re
import struct
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
from gguf import LlamaFileType

from samq import __version__
from samq.data.hub import bytes_told_to, is_unreachable
from samq.errors import SamqError, UnreachableError
from samq.gguf import rescaling
from samq.gguf.file import file_sha256, open_gguf, read_metadata
from samq.home import store_folder
from samq.progress import Progress, silent
from samq.records import ModelSource, digest_of
from samq.safetensors_header import read_safetensors_header
from samq.store import Store

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Top-level files only: some repositories keep the same weights in other formats in folders.
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
OTHER_COPIES = ["consolidated*"]  # the same weights in Mistral's own layout
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
    "preprocessor_config.json",
    "processor_config.json",
)


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
    path = local_path(name)
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


def local_path(name: str) -> Path:
    """The path that a name stands for, which may be package:<module>/<file>; raises SamqError if there is no such package."""
    if not name.startswith("package:"):
        return Path(name)
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
                ignore_patterns=["*/*", *OTHER_COPIES],
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


def is_multimodal(source: ModelSource) -> bool:
    """Whether the model has a vision or audio part beside its text part. A GGUF holds the text part alone."""
    if source.gguf is not None or source.folder is None:
        return False
    config = read_config(source.folder)
    return any(config.get(f"{part}_config") for part in ("vision", "audio", "whisper", "thinker"))


def _check_architecture(config: dict[str, Any], folder: Path) -> None:
    from transformers.models.auto import modeling_auto  # slow to import, and a GGUF does not need it

    from samq.sensitivity.published_types import refused_method

    model_type = config.get("model_type", "")
    texts, multimodal = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    by_type = {**multimodal, **texts}
    names = config.get("architectures") or [by_type.get(model_type)]
    known = {*texts.values(), *multimodal.values()}
    if str(names[0]).lower() not in {
        name.lower() for name in known
    }:  # MPT and Phi-3.5-MoE are published in another case
        raise SamqError(
            f"{folder} is a {names[0] or model_type}, not a causal language model that transformers knows; give a "
            "...ForCausalLM model, or a multimodal one around it"
        )
    if method := refused_method(config):
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
        first, entries = read_safetensors_header(path)
        promised = first + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SamqError(f"{path} has a damaged header; download that file again") from error
    if size != promised:
        raise SamqError(f"{path} has {size} bytes where its header promises {promised}; download that file again")
