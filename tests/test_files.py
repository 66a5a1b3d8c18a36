"""Files are replaced as a whole or not at all, and damaged or foreign ones are named in a sentence."""

import errno
import json
import math
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from autoprune.errors import FileFormatError
from autoprune.files.access import (
    as_path,
    explaining,
    read_json,
    replacing,
    require_file,
    sound,
    write_json,
    write_text,
)
from autoprune.files.formats import Format
from autoprune.files.schema import require_form


@pytest.fixture
def umask():
    """The umask of a user who lets the group read and nobody else."""
    before = os.umask(0o027)
    yield
    os.umask(before)


class TestReplacing:
    def test_a_new_file_has_the_permissions_that_the_umask_leaves(self, tmp_path, umask):
        write_text(tmp_path / "a.json", "1")
        assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640

    def test_a_replaced_file_keeps_its_permissions(self, tmp_path, umask):
        file = tmp_path / "a.json"
        file.write_text("old")
        file.chmod(0o604)
        write_text(file, "new")
        assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == ("new", 0o604)

    def test_a_link_is_followed_and_stays(self, tmp_path):
        (tmp_path / "far").mkdir()
        (tmp_path / "link").symlink_to("far/file")
        for text in ("first", "second"):
            write_text(tmp_path / "link", text)
            assert (tmp_path / "link").is_symlink()
            assert (tmp_path / "far" / "file").read_text() == text

    def test_what_goes_wrong_while_writing_leaves_the_old_file_and_nothing_else(self, tmp_path):
        (tmp_path / "a").write_text("old")

        def write_half():
            with replacing(tmp_path / "a") as fresh:
                fresh.write_text("half")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            write_half()
        assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a", "old")]

    @pytest.mark.parametrize("kind", ["FIFO", "device", "folder", "link to a device"])
    def test_what_is_no_regular_file_is_refused_and_stays(self, tmp_path, kind):
        path = tmp_path / "place"
        if kind == "FIFO":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/null")
        before = path.lstat().st_ino
        named = {"link to a device": "device"}.get(kind, kind)
        with pytest.raises(
            OSError, match=f"output must be free, but there is a {named} at .*place; name another place"
        ):
            write_text(path, "text", "output")
        assert path.lstat().st_ino == before
        assert list(tmp_path.iterdir()) == [path]
        assert stat.S_ISCHR(os.stat("/dev/null").st_mode)

    def test_a_folder_that_is_missing_is_named(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"path must lie in a folder that exists, got .*nowhere/a; make the"
        ):
            write_text(tmp_path / "nowhere" / "a", "text")

    @pytest.mark.parametrize(
        ("number", "kind", "message"),
        [
            (
                errno.ENOSPC,
                OSError,
                r"output could not be written to .*a: no space is left; free some, or name another",
            ),
            (
                errno.EACCES,
                PermissionError,
                r"output must lie where files can be written, got .*a \(Permission denied\)",
            ),
            (errno.EROFS, OSError, r"output must lie where files can be written, got .*a \(Read-only file system\)"),
            (errno.EIO, OSError, r"output could not be written to .*a \(Input/output error\); name another place"),
        ],
    )
    def test_what_the_system_refuses_becomes_a_sentence(self, tmp_path, number, kind, message):
        with pytest.raises(kind, match=message), replacing(tmp_path / "a", "output"):
            raise OSError(number, os.strerror(number))
        assert list(tmp_path.iterdir()) == []

    def test_a_sentence_stays_one(self, tmp_path):
        with pytest.raises(OSError, match=r"^the first$"), explaining(tmp_path, "path"):
            raise OSError("the first")

    def test_threads_that_write_one_file_leave_one_of_theirs(self, tmp_path):
        texts = [str(i) * 10_000 for i in range(4)]
        threads = [threading.Thread(target=write_text, args=(tmp_path / "a", text)) for text in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (tmp_path / "a").read_text() in texts
        assert len(list(tmp_path.iterdir())) == 1

    @pytest.mark.parametrize(
        ("path", "error"), [(5, TypeError), (None, TypeError), ("", ValueError), ("a\0", ValueError)]
    )
    def test_what_is_no_path_is_named(self, path, error):
        with pytest.raises(error, match="output must be a path, got"):
            as_path(path, "output")


def read_numbers(path):
    with sound("a is no table", "measure again"):
        require_form(read_json(path, 2**20), [int])


class TestReading:
    def test_what_is_no_regular_file_is_never_opened(self, tmp_path):
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "zeros").symlink_to("/dev/zero")
        for name, kind in (("fifo", "a FIFO"), ("zeros", "a device"), (".", "a folder")):
            with pytest.raises(FileFormatError, match=f"table must be a file, got .*: it is {kind}; name the file"):
                require_file(tmp_path / name, "table must be a file", 100)

    def test_a_file_over_the_limit_is_refused_before_it_is_read(self, tmp_path):
        with (tmp_path / "sparse").open("wb") as file:
            file.truncate(2**40)
        with pytest.raises(FileFormatError, match="its 1,048,576 MiB are over 1 MiB"):
            require_file(tmp_path / "sparse", "table must be a file", 2**20)

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[NaN]", b"[Infinity]", b"1" * 5_000, b'{"a": 1}'],
        ids=["empty", "cut", "no text", "nested", "NaN", "infinite", "long number", "other form"],
    )
    def test_whatever_is_in_it_becomes_one_error_with_the_way_out(self, tmp_path, content):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(FileFormatError, match=r"^a is no table: .*; measure again$") as caught:
            read_numbers(tmp_path / "a")
        assert len(str(caught.value)) <= 500

    def test_a_message_is_never_longer_than_500_characters_and_keeps_both_ends(self):
        message = str(FileFormatError("a.json is damaged: " + "x" * 10**6 + "; measure again"))
        assert len(message) <= 500
        assert message.startswith("a.json is damaged")
        assert message.endswith("; measure again")

    def test_the_former_name_of_the_error_stays(self):
        assert FileFormatError is FileFormatError


class TestForms:
    @pytest.mark.parametrize(
        ("value", "form"),
        [
            (1, int),
            (1, float),
            (1.5, float),
            (True, bool),
            (None, (int, None)),
            ([1, 2], [int]),
            ({"any": [0.5]}, {str: [float]}),
            ({"a": 1, "more": "is left alone"}, {"a": int, "b?": str}),
            ("ok", frozenset({"ok", "failed"})),
            ({"deep": []}, object),
        ],
    )
    def test_what_fits_passes(self, value, form):
        require_form(value, form)

    @pytest.mark.parametrize(
        ("value", "form", "message"),
        [
            (True, int, "it must be a whole number, got True"),
            (1.0, int, "it must be a whole number, got 1.0"),
            (10**400, float, "it must be a finite number"),
            (float("nan"), float, "it must be a finite number, got nan"),
            ("1", float, "it must be a finite number, got '1'"),
            ([1, "2"], [int], r"it\[1\] must be a whole number, got '2'"),
            ({"a": {"b": 1}}, {"a": {"b": str}}, "a.b must be text, got 1"),
            ({}, {"a": int}, "'a' is missing"),
            ({"b": None}, {"b?": str}, "b must be text, got None"),
            ({"x": 1}, {str: str}, r"it\['x'\] must be text"),
            ([], {str: str}, r"it must be an object, got \[\]"),
            ({}, [int], "it must be a list"),
            (2, (str, None), "it must be text or null, got 2"),
            (2, ([int], {"a": int}, None), "it must be a list or an object or null, got 2"),
            ([], frozenset({"ok"}), r"it must be one of \['ok'\], got \[\]"),
            ("x" * 10**6, int, "got '" + "x" * 59 + "$"),
        ],
    )
    def test_what_does_not_is_named_with_its_place(self, value, form, message):
        with pytest.raises(ValueError, match=message):
            require_form(value, form)

    def test_parsed_json_of_a_real_file_is_what_it_was(self, tmp_path):
        write_text(tmp_path / "a", json.dumps({"a": [1, None, "ä"]}))
        assert read_json(Path(tmp_path, "a"), 100) == {"a": [1, None, "ä"]}


class TestFormats:
    FORMAT = Format("autoprune-example", 2, "an example")

    def read(self, file: Path) -> dict[str, Any]:
        return self.FORMAT.read_json(file, "path must be an example", "write it again", 1000, {"sizes": [int]})

    def test_what_was_written_is_read(self, tmp_path):
        file = write_json(tmp_path / "a.json", {**self.FORMAT.stamp(), "sizes": [3], "note": math.nan})
        assert self.read(file) == {"format": "autoprune-example", "version": 2, "sizes": [3], "note": None}
        self.FORMAT.require(self.FORMAT.header())

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"format": "other"}, "it has the format 'other', and not 'autoprune-example', so another tool"),
            ({"format": None}, "it names no format, and not 'autoprune-example'"),
            (
                {"version": 3, "sizes": "of a newer form"},
                "it has version 3, and this autoprune reads 2: use the one that",
            ),
            ({"version": True}, "it has version True"),
            ({"sizes": ["3"]}, "must be a whole number"),
        ],
    )
    def test_another_format_version_or_form_is_named_with_the_file(self, tmp_path, change, told):
        file = write_json(tmp_path / "a.json", {**self.FORMAT.stamp(), "sizes": [3], **change})
        with pytest.raises(FileFormatError) as caught:
            self.read(file)
        assert str(caught.value).startswith(f"{file} is not an example of autoprune, or is damaged: ")
        assert told in str(caught.value)
        assert str(caught.value).endswith("; write it again")

    def test_json_of_another_kind_is_named(self, tmp_path):
        (tmp_path / "a.json").write_text("[]")
        with pytest.raises(FileFormatError, match="it must be an object"):
            self.read(tmp_path / "a.json")
