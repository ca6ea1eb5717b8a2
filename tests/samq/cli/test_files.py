"""Files that commands are given."""

import pytest

from samq.cli.files import adopt
from samq.errors import SamqError
from samq.files import GGUF_NAME


def test_an_adopted_file_is_kept_once_by_its_content(samq_home, tmp_path, gguf, terminal):
    first = adopt({GGUF_NAME: gguf})
    assert first.path(GGUF_NAME).read_bytes() == gguf.read_bytes()
    assert "open tiny.gguf" in terminal.getvalue() and "read tiny.gguf" in terminal.getvalue()
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(gguf.read_bytes())
    assert adopt({GGUF_NAME: copy}).folder == first.folder


def test_a_missing_or_truncated_file_is_not_adopted(samq_home, tmp_path, cut_gguf):
    with pytest.raises(SamqError, match=r"map\.json does not exist"):
        adopt({"sensitivity-map.json": tmp_path / "map.json"})
    with pytest.raises(SamqError, match="not a whole GGUF file"):
        adopt({GGUF_NAME: cut_gguf})
