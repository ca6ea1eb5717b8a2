import gzip
import json

import pandas
import pyarrow.parquet
import pytest

from samq.data.datasets import DatasetSpec, is_one_document, load_texts, require_disjoint
from samq.errors import SamqError


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def letters(tmp_path):
    return jsonl(tmp_path / "letters.jsonl", [{"text": letter} for letter in "abcdefghij"])


def test_rows_are_shuffled_by_the_seed_and_then_sliced(letters):
    whole = load_texts(DatasetSpec(name=letters))
    assert sorted(whole) == list("abcdefghij") and whole != sorted(whole)
    assert load_texts(DatasetSpec(name=letters)) == whole
    assert load_texts(DatasetSpec(name=letters, seed=1)) != whole
    assert load_texts(DatasetSpec(name=letters, start=3, samples=4)) == whole[3:7]


@pytest.mark.parametrize("name", ["humaneval", "gsm8k", "hellaswag", "truthfulqa"])
def test_packaged_items_are_text(name):
    texts = load_texts(DatasetSpec(name=name, samples=20))
    assert len(set(texts)) == 20 and all(len(text) > 20 for text in texts)


def test_humaneval_joins_prompt_and_solution_without_a_gap():
    (text,) = load_texts(DatasetSpec(name="humaneval", samples=1))
    (prompt,) = load_texts(DatasetSpec(name="humaneval", samples=1, fields=("prompt",)))
    (solution,) = load_texts(DatasetSpec(name="humaneval", samples=1, fields=("canonical_solution",)))
    assert text == prompt + solution
    compile(text, "humaneval", "exec")


def test_fields_without_white_space_between_are_joined_by_a_newline(tmp_path):
    name = jsonl(tmp_path / "qa.jsonl", [{"q": "Why?", "a": "Because."}])
    assert load_texts(DatasetSpec(name=name, fields=("q", "a"))) == ["Why?\nBecause."]


def test_all_file_formats_hold_the_same_rows(tmp_path, letters):
    rows = [{"text": letter} for letter in "abcdefghij"]
    (tmp_path / "l.json").write_text(json.dumps(rows))
    pandas.DataFrame(rows).to_parquet(tmp_path / "l.parquet")
    (tmp_path / "l.txt").write_text("\n\f\n".join("abcdefghij"))
    (tmp_path / "l.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    expected = load_texts(DatasetSpec(name=letters))
    for name in ("l.json", "l.parquet", "l.txt", "l.jsonl.gz"):
        assert load_texts(DatasetSpec(name=str(tmp_path / name))) == expected


def test_a_text_file_without_form_feeds_is_one_document(tmp_path):
    (tmp_path / "one.txt").write_text("first\n\nlast\n")
    assert load_texts(DatasetSpec(name=str(tmp_path / "one.txt"))) == ["first\n\nlast\n"]
    assert is_one_document(str(tmp_path / "one.txt"))


def test_only_text_that_nothing_cuts_is_one_document(tmp_path):
    (tmp_path / "two.txt").write_text("first\n\f\nlast\n")
    names = (str(tmp_path / "two.txt"), jsonl(tmp_path / "one.jsonl", [{"text": "a"}]), "humaneval", "org/set")
    assert not any(map(is_one_document, names))


def test_a_folder_is_loaded_as_the_hubs_data_sets_are(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl(folder / "train.jsonl", [{"body": "one"}, {"body": "two"}])
    jsonl(folder / "test.jsonl", [{"body": "three"}])
    assert sorted(load_texts(DatasetSpec(name=str(folder), fields=("body",)))) == ["one", "two"]
    assert load_texts(DatasetSpec(name=str(folder), fields=("body",), split="test")) == ["three"]


def test_slices_that_share_rows_are_refused(letters):
    def spec(**arguments):
        return DatasetSpec(name=letters, **arguments)

    require_disjoint(spec(samples=3), spec(start=3))
    require_disjoint(spec(start=5, samples=2), spec(start=1, samples=4))
    require_disjoint(spec(samples=9), DatasetSpec(name="humaneval"))
    require_disjoint(spec(samples=9, split="train"), spec(samples=9, split="test"))
    with pytest.raises(SamqError, match="overlap: they start at 0 and 2; move the later start to 3 or beyond"):
        require_disjoint(spec(samples=3), spec(start=2))
    with pytest.raises(SamqError, match="overlap: neither has an end"):
        require_disjoint(spec(), spec(start=2))
    with pytest.raises(SamqError, match="shuffled by seeds 0 and 1; use one seed"):
        require_disjoint(spec(samples=3), spec(start=5, seed=1))


def test_the_same_file_under_another_name_is_the_same_data_set(letters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SamqError, match="overlap"):
        require_disjoint(DatasetSpec(name=letters, samples=3), DatasetSpec(name="letters.jsonl", start=1))


def test_an_unnamed_split_is_train():
    with pytest.raises(SamqError, match="overlap"):
        require_disjoint(DatasetSpec(name="org/set", samples=3), DatasetSpec(name="org/set", split="train"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("lost.jsonl", None, "there is no data file at .*lost.jsonl; check the path"),
        ("a.csv", b"text\na", "a.csv is not a data file of a known kind; give one of .jsonl"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3 of .*a.jsonl is not JSON"),
        ("a.jsonl", b'["a"]\n', "line 1 of .*a.jsonl is list, not an object with fields"),
        ("a.jsonl", b'{"text": "a"}\n{"text": " "}\n', "the text of row 2 of .*a.jsonl is empty; remove that row"),
        ("a.jsonl", b'{"body": "a", "id": 1}\n', "row 1 of .*a.jsonl has no field 'text'; name .*: body, id"),
        ("a.jsonl", b'{"text": ["a"]}\n', "field 'text' of row 1 of .*a.jsonl is list, not text"),
        ("a.jsonl", b"", "a.jsonl has 0 samples, none from number 0 on"),
        (
            "a.jsonl",
            b'{"text": "an \\ud83d"}',
            r"character 4 of the text of row 1 of .*a.jsonl is half .*'an .ud83d'.*; remove it",
        ),
        (
            "a.json",
            b'[{"text": "a"}, {"text": "\\udc00"}]',
            "character 1 of the text of row 2 of .*a.json is half a char",
        ),
        ("a.jsonl", b"[" * 100_000, "line 1 of .*a.jsonl is not JSON"),
        ("a.json", b"[" * 100_000, "a.json is not JSON"),
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8 at byte 3; convert it to UTF-8"),
        ("a.json", b"[", "a.json is not JSON .*name it .jsonl if each line is one row"),
        ("a.json", b'{"text": "a"}', "a.json holds dict, not a list of rows"),
        ("a.parquet", b"PAR1 no", "a.parquet is not a whole parquet file"),
        ("a.jsonl.gz", b"no gzip", "cannot read .*a.jsonl.gz"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:10] + b"\xff" * 20, "cannot read .*a.jsonl.gz"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SamqError, match=message):
        load_texts(DatasetSpec(name=str(tmp_path / name)))


def write_latin(path):
    """A parquet file whose text says that it is UTF-8, and is not."""
    latin = pyarrow.array([b"cafe", b"caf\xe9"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, latin.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)


def test_text_of_a_parquet_file_that_is_not_utf_8_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_latin(tmp_path / "a.parquet")
    write_latin(tmp_path / "set" / "train.parquet")
    with pytest.raises(SamqError, match=r"a text of .*a.parquet is not UTF-8 \(.*\); write the file again, in UTF-8"):
        load_texts(DatasetSpec(name=str(tmp_path / "a.parquet")))
    with pytest.raises(SamqError, match=r"row 2 of .*set is not UTF-8 \(.*\); correct or remove that row"):
        load_texts(DatasetSpec(name=str(tmp_path / "set")))


def test_too_few_rows_say_how_many_there_are(letters):
    with pytest.raises(SamqError, match="has 10 samples, too few for 6 from number 5 on; ask for fewer"):
        load_texts(DatasetSpec(name=letters, start=5, samples=6))
    with pytest.raises(SamqError, match="has 10 samples, none from number 10 on"):
        load_texts(DatasetSpec(name=letters, start=10))


def test_an_unknown_name_is_one_sentence():
    with pytest.raises(SamqError, match=r"no-such-set is not one of humaneval, .*, nor a file, and the hub") as caught:
        load_texts(DatasetSpec(name="nobody/no-such-set"))
    assert "\n" not in str(caught.value)


def test_a_slice_in_the_split_is_refused():
    with pytest.raises(SamqError, match=r"split 'train\[:10\]' contains a slice"):
        load_texts(DatasetSpec(name="org/set", split="train[:10]"))
