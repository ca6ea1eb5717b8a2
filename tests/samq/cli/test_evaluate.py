"""`samq evaluate`; `samq lm-eval` is tested with the model that it registers."""

from tests.command_line import refused


def test_a_file_is_evaluated_on_from_its_first_sample_with_progress(samq, terminal, tmp_path, speaking_gguf):
    text = tmp_path / "text.txt"
    text.write_text("the other text\n" * 40)
    arguments = ("--baseline", speaking_gguf, "--dataset", text, "--context-tokens", 64, "--chunks", 2)
    done = samq("evaluate", speaking_gguf, *arguments, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for what in ("load Python packages", f"read {text}", f"tokenize {text}"):
        assert what in terminal.getvalue()
    assert "fidelity/mean_kld_nats" in done.stderr
    title = f"full.gguf on {text}, from sample 0"
    assert "".join(title.split()) in "".join(done.stderr.split())  # the table breaks it into lines
    assert (tmp_path / "out" / "evaluation.json").is_file()


def test_a_read_only_output_folder_is_refused_before_the_work(samq, gguf, disk):
    disk.make_read_only()
    done = samq("evaluate", gguf, "--baseline", gguf, "--out", disk.folder / "out")
    assert refused(done, "out cannot be written to (Read-only file system)")
