from __future__ import annotations

import json
import math

import pytest
from beit3_fast.bench.files import check_writable, replacing, write_json


def test_the_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out.json"
    target.write_text("before")

    def interrupted():
        with replacing(target) as temporary:
            assert temporary.parent == tmp_path
            assert temporary.suffix == ".json"
            assert temporary != target
            temporary.write_text("half")
            assert target.read_text() == "before"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    assert target.read_text() == "before"
    with replacing(target) as temporary:
        temporary.write_text("after")
        assert target.read_text() == "before"
    with target.open() as reader:
        with replacing(target) as temporary:
            temporary.write_text("later")
        assert reader.read() == "after", "who had the file open keeps the old one whole"
    assert target.read_text() == "later"
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": math.nan})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None]}


def test_what_cannot_be_written_is_refused_and_nothing_is_left(tmp_path):
    assert check_writable(tmp_path / "new.png", "--output") == tmp_path / "new.png"
    with pytest.raises(FileNotFoundError, match=r"--output: the folder '.*missing' does not exist"):
        check_writable(tmp_path / "missing" / "new.png", "--output")
    with pytest.raises(ValueError, match=r"--json: '.*' is a folder, a file name is needed"):
        check_writable(tmp_path, "--json")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a folder"):
        check_writable(tmp_path / "file" / "new.png", "--output")
    with pytest.raises(ValueError, match=r"--output: nothing can be written into the folder '/proc'"):
        check_writable("/proc/new.png", "--output")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_write_permission(tmp_path, monkeypatch):
    def refused(self, exist_ok):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.touch", refused)  # root, which tests often run as, may write anywhere
    with pytest.raises(ValueError, match="Permission denied"):
        check_writable(tmp_path / "new.png", "--output")
