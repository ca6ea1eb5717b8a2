"""A GGUF in several files is never taken for its first part."""

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

from samq.allocation.target import OpenTarget
from samq.errors import SamqError
from samq.gguf.file import gguf_files, open_gguf, read_metadata, read_tensors
from samq.serving.source import find_source
from tests.conftest import write_tiny_gguf

PROGRAM = Path(sysconfig.get_path("platlib")) / "bin" / "llama-gguf-split"


@pytest.fixture
def whole(tmp_path):
    return write_tiny_gguf(tmp_path / "a model.gguf", add_tokenizer=lambda writer: writer.add_name("tiny"))


@pytest.fixture
def parts(whole, tmp_path):
    """The three files of a GGUF."""
    (tmp_path / "parts").mkdir()
    command = [PROGRAM, "--split", "--split-max-tensors", "10", whole, tmp_path / "parts" / "a model"]
    subprocess.run(command, check=True, capture_output=True)
    files = sorted((tmp_path / "parts").iterdir())
    assert [file.name for file in files] == [f"a model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    return files


def test_a_whole_file_is_its_only_part(whole):
    assert gguf_files(whole) == [whole]


def test_the_parts_together_are_the_model(whole, parts):
    assert gguf_files(parts[0]) == parts
    tensors = {name: tensor for part in parts for name, tensor in read_tensors(part, is_part=True).items()}
    assert tensors == read_tensors(whole)
    assert read_metadata(parts[0], is_part=True)["general.name"] == "tiny"


def test_a_part_is_refused_with_the_command_that_merges_all(whole, parts):
    for number, part in enumerate(parts, 1):
        with pytest.raises(
            SamqError, match=rf"gguf is part {number} of 3 of a GGUF, and not the model; merge"
        ) as error:
            open_gguf(part)
    command = str(error.value).split("`")[1]
    subprocess.run(["sh", "-c", command], check=True, capture_output=True)
    merged = parts[0].with_name("a model.gguf")
    assert str(error.value).endswith(f"and give {merged}")
    assert gguf_files(merged) == [merged]
    assert read_tensors(merged) == read_tensors(whole)


def test_another_part_than_the_first_or_a_missing_one_is_said(parts):
    with pytest.raises(SamqError, match=r"is part 2 of 3 of a GGUF; give the first, .*a model-00001-of-00003\.gguf"):
        gguf_files(parts[1])
    parts[2].unlink()
    with pytest.raises(SamqError, match=r"is part 1 of 3 .*00003-of-00003\.gguf is missing; put all parts into"):
        gguf_files(parts[0])
    with pytest.raises(SamqError, match=r"not the model; get .*00003-of-00003\.gguf, then merge the parts with"):
        open_gguf(parts[0])


def test_parts_need_names_that_llama_cpp_finds(parts, tmp_path):
    os.rename(parts[0], tmp_path / "first.gguf")
    for read in (open_gguf, gguf_files):
        with pytest.raises(
            SamqError, match=r"first\.gguf is part 1 of 3 of a GGUF; rename the parts to NAME-00001-of-00003"
        ):
            read(tmp_path / "first.gguf")


def test_a_part_is_neither_planned_nor_served(parts, toolchain):
    with pytest.raises(SamqError, match="is part 1 of 3 of a GGUF, and not the model"):
        OpenTarget.open(parts[0], toolchain)
    with pytest.raises(SamqError, match="is part 1 of 3 of a GGUF, and not the model"):
        find_source(str(parts[0]))
