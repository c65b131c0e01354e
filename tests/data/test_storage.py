import threading
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvmatch.data import storage

ODD = "a b%20c é#?"


@pytest.fixture(params=["path", "uri"])
def place(request, tmp_path) -> str:
    """A directory with a hard name, as a plain path and as a URI."""
    path = f"{tmp_path}/{ODD}"
    return path if request.param == "path" else "file://" + quote(path)


def test_write_then_read_gives_the_content_and_leaves_nothing_else(place):
    file = storage.join(place, "deep", "er", "x.txt")
    storage.write_text(file, "grüße\n")
    storage.write_text(file, "twice\n")
    assert storage.read_text(file) == "twice\n"
    assert storage.names(storage.join(place, "deep", "er")) == ["x.txt"]
    assert storage.exists(file)
    assert not storage.exists(file + ".old")


def test_write_json_reads_back_and_is_the_same_text_for_the_same_value(place):
    first, second = storage.join(place, "1.json"), storage.join(place, "2.json")
    storage.write_json(first, {"b": [1, None], "a": "é"})
    storage.write_json(second, {"a": "é", "b": [1, None]})
    assert storage.read_json(first) == {"a": "é", "b": [1, None]}
    assert storage.read_bytes(first) == storage.read_bytes(second)


def test_write_bytes_reader_sees_the_old_or_the_new_content_never_a_part(tmp_path):
    file = str(tmp_path / "x.bin")
    contents = [bytes([value]) * 1_000_000 for value in (1, 2)]
    storage.write_bytes(file, contents[0])
    finished = threading.Event()

    def write() -> None:
        for turn in range(40):
            storage.write_bytes(file, contents[turn % 2])
        finished.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not finished.is_set() or not reads:
        assert storage.read_bytes(file) in contents
        reads += 1
    writer.join()
    assert storage.names(str(tmp_path)) == ["x.bin"]


def test_read_bytes_absent_file_is_named(place):
    with pytest.raises(FileNotFoundError, match=r"absent\.bin"):
        storage.read_bytes(storage.join(place, "absent.bin"))


def test_names_absent_directory_is_empty_and_directories_can_be_told_apart(place):
    assert storage.names(storage.join(place, "absent")) == []
    storage.write_text(storage.join(place, "b.txt"), "")
    storage.write_text(storage.join(place, "a", "c.txt"), "")
    assert storage.names(place) == ["a", "b.txt"]
    assert storage.names(place, directories=True) == ["a"]


def test_remove_deletes_the_directory_and_nothing_beside_it(place):
    storage.write_text(storage.join(place, "a", "x.txt"), "")
    storage.write_text(storage.join(place, "ab", "x.txt"), "")
    storage.remove(storage.join(place, "a"))
    storage.remove(storage.join(place, "never"))
    assert storage.names(place) == ["ab"]


def test_absolute_keeps_uris_and_anchors_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.absolute("data/x") == f"{tmp_path}/data/x"
    assert storage.absolute("~/x") == "/home/someone/x"
    assert storage.absolute("s3://bucket/x") == "s3://bucket/x"


def test_join_keeps_both_slashes_of_a_uri():
    assert storage.join("s3://bucket/", "a", "b.txt") == "s3://bucket/a/b.txt"


@pytest.mark.parametrize(
    "relative",
    [
        "../x",
        "a/../../x",
        "a/..",
        "..\\x",
        "a\\..\\..\\x",
        "/etc/passwd",
        "//host/share",
        "\\\\host\\share",
        "\\x",
        "C:\\x",
        "c:x",
        "C:/x",
        "file:/etc/passwd",
        "file:///etc/passwd",
        "s3://bucket/x",
        "",
        ".",
        "./",
        "a\0b",
    ],
)
@pytest.mark.parametrize("root", ["/data/root", "file:///data/root", "s3://bucket/root"])
def test_inside_path_that_leaves_the_root_is_refused(root, relative):
    with pytest.raises(ValueError, match="the data root"):
        storage.inside(root, relative)


@pytest.mark.parametrize(
    ("relative", "expected"),
    [
        ("a/b.png", "a/b.png"),
        ("./a//b.png", "a/b.png"),
        ("a\\b.png", "a/b.png"),
        ("a..b/...", "a..b/..."),
        (".hidden", ".hidden"),
    ],
)
def test_inside_path_below_the_root_is_joined(relative, expected):
    assert storage.inside("/data/root", relative) == f"/data/root/{expected}"


def test_inside_quoted_dots_do_not_leave_a_root_that_is_a_uri(tmp_path):
    storage.write_text(str(tmp_path / "secret"), "")
    (tmp_path / "root").mkdir()
    assert not storage.exists(storage.inside(f"file://{tmp_path}/root", "%2e%2e/secret"))


def test_inside_odd_name_is_found_below_a_path_and_a_uri(place):
    path = storage.inside(place, ODD)
    storage.write_text(path, "here")
    assert storage.names(place) == [ODD]
    assert storage.read_text(path) == "here"


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet="./\\ab:%2e~", max_size=12))
def test_inside_any_text_stays_below_the_root_or_is_refused(relative):
    for root in ("/data/root", "file:///data/root"):
        try:
            location = storage.inside(root, relative)
        except ValueError:
            continue
        _, path = storage.resolve(location)
        assert path.startswith("/data/root/")
        assert ".." not in path.split("/")


@pytest.mark.parametrize(
    "text",
    [
        "When reading 'a' in bucket 'b': AWS Error SLOW_DOWN during GetObject operation",
        "AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: no response body",
        "AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7, Could not connect",
        "google::cloud::Status(UNAVAILABLE: Permanent error, status code: 503)",
    ],
)
def test_retry_passing_asks_a_store_again_that_refuses_for_a_moment(text):
    asked = []

    @storage.retry_passing
    def read() -> bytes:
        asked.append(text)
        if len(asked) < 3:
            raise OSError(text)
        return b"content"

    assert read() == b"content"
    assert len(asked) == 3


@pytest.mark.parametrize(
    "error",
    [
        OSError("AWS Error ACCESS_DENIED during GetObject operation: Access Denied"),
        FileNotFoundError("AWS Error NO_SUCH_KEY during GetObject operation"),
        OSError(28, "No space left on device"),
        ValueError("HTTP status 503"),
    ],
)
def test_retry_passing_raises_at_once_what_does_not_pass(error):
    asked = []

    @storage.retry_passing
    def read() -> None:
        asked.append(error)
        raise error

    with pytest.raises(type(error)):
        read()
    assert len(asked) == 1


def test_retry_passing_ends_with_the_error_of_a_store_that_stays_away(monkeypatch):
    monkeypatch.setattr(storage, "PATIENCE_S", 0.2)

    @storage.retry_passing
    def read() -> None:
        raise OSError("AWS Error SLOW_DOWN during GetObject operation")

    with pytest.raises(OSError, match="SLOW_DOWN"):
        read()


def test_swap_bytes_in_a_store_writes_only_over_what_was_expected(bucket):
    place = f"{bucket}/deep/CURRENT"
    assert not storage.swap_bytes(place, b"old", b"new")
    assert storage.swap_bytes(place, None, b"one")
    assert not storage.swap_bytes(place, None, b"two")
    assert not storage.swap_bytes(place, b"other", b"two")
    assert storage.read_bytes(place) == b"one"
    assert storage.swap_bytes(place, b"one", b"two")
    assert storage.read_bytes(place) == b"two"


def test_local_directory_copies_what_is_in_a_store_once_and_again_when_it_changed(bucket, tmp_path):
    model = f"{bucket}/models/matcher"
    with pytest.raises(FileNotFoundError, match="models/matcher: expected a directory with files"):
        storage.local_directory(model)
    storage.write_text(storage.join(model, "config.json"), "{}")
    storage.write_text(storage.join(model, "unet", "weights"), "1")
    copy = storage.local_directory(model)
    assert storage.read_text(f"{copy}/unet/weights") == "1"
    assert storage.local_directory(model) == copy
    storage.write_text(storage.join(model, "unet", "weights"), "22")
    again = storage.local_directory(model)
    assert storage.read_text(f"{again}/unet/weights") == "22"
    assert storage.read_text(f"{copy}/unet/weights") == "1"  # who has it open keeps it
    assert storage.local_directory(str(tmp_path)) == str(tmp_path)
    assert storage.local_directory(f"file://{tmp_path}") == str(tmp_path)
