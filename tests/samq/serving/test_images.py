"""Images in requests, where a vision part is served beside the model."""

import base64
import io

import gguf
import numpy as np
import pytest
from PIL import Image

from samq.serving.source import FileSource
from tests.samq.serving.conftest import refused, running

WIDTH, SIDE, PATCH, BLOCKS, OF_TEXT = 32, 28, 14, 2, 128
TOKENS = (SIDE // PATCH) ** 2  # that an image becomes


@pytest.fixture(scope="module")
def vision_part(tmp_path_factory):
    """Like LLaVA's: a CLIP of random weights, and a projection to the text model's width."""
    path, random = tmp_path_factory.mktemp("vision") / "mmproj.gguf", np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(SIDE)
    writer.add_vision_patch_size(PATCH)
    writer.add_vision_embedding_length(WIDTH)
    writer.add_vision_feed_forward_length(WIDTH)
    writer.add_vision_block_count(BLOCKS)
    writer.add_vision_head_count(2)
    writer.add_vision_projection_dim(OF_TEXT)
    writer.add_vision_attention_layernorm_eps(1e-5)
    writer.add_vision_image_mean([0.5] * 3)
    writer.add_vision_image_std([0.5] * 3)
    shapes = {"v.patch_embd": (WIDTH, 3, PATCH, PATCH), "v.position_embd": (TOKENS, WIDTH)}
    shapes |= {"mm.0": (OF_TEXT, WIDTH), "mm.2": (OF_TEXT, OF_TEXT)}
    for block in range(BLOCKS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down"):
            shapes[f"v.blk.{block}.{name}"] = (WIDTH, WIDTH)
        shapes |= {f"v.blk.{block}.{name}": (WIDTH,) for name in ("ln1", "ln2")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    for name in ("mm.0", "mm.2", *(f"v.blk.{block}.{norm}" for block in range(BLOCKS) for norm in ("ln1", "ln2"))):
        writer.add_tensor(f"{name}.bias", np.zeros(shapes[name][0], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def asking(colour):
    written = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), colour).save(written, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "hello"}]
    return {"messages": [{"role": "user", "content": content}]}


def test_an_image_is_part_of_the_prompt(chat_gguf, vision_part):
    with running(FileSource(chat_gguf, vision_part)) as server:
        text, red, blue = (server.chat(**body).json() for body in ({}, asking("red"), asking("blue")))
        of_text, *of_images = (answer["usage"]["prompt_tokens"] for answer in (text, red, blue))
        assert of_images == [of_text + TOKENS] * 2
        assert red["choices"] != blue["choices"]


def test_a_model_without_a_vision_part_refuses_an_image(chat_gguf):
    with running(FileSource(chat_gguf)) as server:
        refused(server.chat(**asking("red")), 400, "image input is not supported")
        assert server.chat().status_code == 200
