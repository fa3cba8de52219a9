"""Models are found wherever they lie: bare files, folders of files, Triton trees, single model directories."""

import os
from pathlib import Path

import pytest
from penstock.errors import Kind, ServingError
from penstock.repository import ModelSource, read_labels, scan


def lay(root: Path, *names: str) -> Path:
    """Make files, and directories where a name ends in a slash."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text("x")
    return root


def found(*roots: Path, config_name: str = "") -> dict[str, list[int]]:
    """The versions of every model that is found once."""
    return {name: list(sources[0].versions) for name, sources in scan(roots, config_name).items() if len(sources) == 1}


def only(root: Path, config_name: str = "") -> ModelSource:
    [[source]] = scan([root], config_name).values()
    return source


# -- shapes


def test_a_bare_file_is_version_1_of_a_model_with_its_name(tmp_path: Path) -> None:
    lay(tmp_path, "resnet.v2.onnx", "other.onnx")
    source = only(tmp_path / "resnet.v2.onnx")
    assert (source.name, source.versions, source.config) == ("resnet.v2", {1: tmp_path / "resnet.v2.onnx"}, None)


def test_a_folder_of_files_is_as_many_models(tmp_path: Path) -> None:
    lay(tmp_path, "a.onnx", "b.onnx", "readme.md", ".hidden.onnx", "a.onnx.data")
    assert found(tmp_path) == {"a": [1], "b": [1]}


@pytest.mark.parametrize("name", ["handler.py", "rp_handler.py"])
def test_a_handler_file_makes_its_directory_version_1_of_a_model(tmp_path: Path, name: str) -> None:
    lay(tmp_path, f"m/{name}", "m/tests/handler.py", "m/readme.md", "plain.onnx")
    source = only(tmp_path / "m")
    assert (source.name, source.directory, source.versions) == ("m", tmp_path / "m", {1: tmp_path / "m"})
    assert found(tmp_path) == {"m": [1], "plain": [1]}


def test_a_handler_file_can_be_served_by_its_path(tmp_path: Path) -> None:
    lay(tmp_path, "m/handler.py", "m/rp_handler.py", "m/config.pbtxt")
    source = only(tmp_path / "m/rp_handler.py")
    assert (source.name, source.directory, source.config) == ("m", tmp_path / "m", tmp_path / "m/config.pbtxt")
    assert source.versions == {1: tmp_path / "m/rp_handler.py"}


def test_handler_files_beside_version_directories_are_no_version(tmp_path: Path) -> None:
    lay(tmp_path, "m/handler.py", "m/2/handler.py")
    assert only(tmp_path / "m").versions == {2: tmp_path / "m/2"}


def test_a_tree_has_a_model_in_each_directory_and_may_have_bare_files_beside(tmp_path: Path) -> None:
    lay(tmp_path, "m/1/model.onnx", "m/2/model.onnx", "m/config.pbtxt", "plain.onnx", "n/3/model.onnx")
    assert found(tmp_path) == {"m": [1, 2], "n": [3], "plain": [1]}


def test_a_single_model_directory_is_one_model(tmp_path: Path) -> None:
    lay(tmp_path, "m/1/model.onnx", "m/10/model.onnx", "m/2/model.onnx", "m/config.pbtxt")
    source = only(tmp_path / "m")
    assert (source.name, source.config) == ("m", tmp_path / "m/config.pbtxt")
    assert list(source.versions.items()) == [(number, tmp_path / f"m/{number}") for number in (1, 2, 10)]


def test_a_directory_with_a_configuration_and_no_version_is_a_model_without_versions(tmp_path: Path) -> None:
    lay(tmp_path, "m/config.pbtxt")
    assert found(tmp_path) == {"m": []}


@pytest.mark.parametrize("name", ["01", "1a", "v1", "-1", "1.0", "¹", "warmup", "initial_state", "configs", ".1"])
def test_other_directories_of_a_model_are_no_versions(tmp_path: Path, name: str) -> None:
    lay(tmp_path, "m/config.pbtxt", f"m/{name}/model.onnx", "m/7/model.onnx", "m/0/model.onnx", "m/8")
    assert found(tmp_path) == {"m": [0, 7]}


def test_directories_that_are_no_models_are_passed_over(tmp_path: Path) -> None:
    lay(tmp_path, "m/1/model.onnx", "docs/readme.md", ".git/1/x", "empty/", "model.onnx/")
    assert found(tmp_path) == {"m": [1]}


def test_an_empty_repository_holds_nothing(tmp_path: Path) -> None:
    assert scan([tmp_path]) == {}


def test_several_repositories_are_one_table(tmp_path: Path) -> None:
    lay(tmp_path, "one/a/1/model.onnx", "two/b.onnx")
    assert found(tmp_path / "one", tmp_path / "two") == {"a": [1], "b": [1]}


def test_a_name_in_two_places_is_found_twice(tmp_path: Path) -> None:
    lay(tmp_path, "one/a/1/model.onnx", "two/a.onnx")
    assert [source.directory.name for source in scan([tmp_path / "one", tmp_path / "two"])["a"]] == ["a", "two"]


def test_a_link_keeps_its_name_whatever_it_points_to(tmp_path: Path) -> None:
    lay(tmp_path, "blobs/0f3a", "tree/1/model.onnx")
    (tmp_path / "model.onnx").symlink_to(tmp_path / "blobs/0f3a")
    (tmp_path / "named").symlink_to(tmp_path / "tree")
    assert only(tmp_path / "model.onnx").name == "model"
    assert only(tmp_path / "named").name == "named"


def test_a_path_is_named_by_where_it_leads(tmp_path: Path) -> None:
    lay(tmp_path, "m/1/model.onnx")
    assert only(tmp_path / "m/1/..").name == "m"


def test_a_repository_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServingError) as caught:
        scan([tmp_path / "nowhere"])
    assert (caught.value.kind, caught.value.message) == (
        Kind.NOT_FOUND,
        f"model repository '{tmp_path}/nowhere' does not exist",
    )


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    lay(tmp_path, "weights.pt")
    with pytest.raises(ServingError, match=r"weights\.pt' is no model: expected a file that ends in \.onnx") as caught:
        scan([tmp_path / "weights.pt"])
    assert caught.value.kind is Kind.INVALID


# -- configurations


@pytest.mark.parametrize(
    ("config_name", "config"),
    [("", "config.pbtxt"), ("small", "configs/small.pbtxt"), ("absent", "config.pbtxt")],
)
def test_a_named_configuration_is_preferred_where_it_exists(tmp_path: Path, config_name: str, config: str) -> None:
    lay(tmp_path, "m/1/model.onnx", "m/config.pbtxt", "m/configs/small.pbtxt")
    assert only(tmp_path / "m", config_name).config == tmp_path / "m" / config


def test_a_model_without_a_configuration_has_none(tmp_path: Path) -> None:
    lay(tmp_path, "m/1/model.onnx")
    assert only(tmp_path / "m").config is None


# -- fingerprints


def test_a_fingerprint_stays_while_nothing_changes(tmp_path: Path) -> None:
    lay(tmp_path, "m/1/model.onnx", "m/config.pbtxt", "m/labels.txt")
    assert only(tmp_path / "m").fingerprint() == only(tmp_path / "m").fingerprint()


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("1/model.onnx", "1"),
        ("2/deep/weights.bin", "2"),
        ("config.pbtxt", "config"),
        ("labels.txt", "other"),
        ("warmup/data", "other"),
    ],
)
def test_a_fingerprint_tells_which_part_changed(tmp_path: Path, path: str, part: str) -> None:
    names = ("1/model.onnx", "2/deep/weights.bin", "config.pbtxt", "labels.txt", "warmup/data")
    lay(tmp_path / "m", *names)
    before = only(tmp_path / "m").fingerprint()
    os.utime(tmp_path / "m" / path, ns=(2**61, 2**61))
    after = only(tmp_path / "m").fingerprint()
    assert {key for key in before if before[key] != after[key]} == {part}


def test_a_new_version_changes_the_fingerprint(tmp_path: Path) -> None:
    before = only(lay(tmp_path / "m", "1/model.onnx")).fingerprint()
    assert only(lay(tmp_path / "m", "2/model.onnx")).fingerprint().keys() - before.keys() == {"2"}


def test_a_bare_file_does_not_change_with_its_neighbours(tmp_path: Path) -> None:
    lay(tmp_path, "a.onnx", "b.onnx")
    before = only(tmp_path / "a.onnx").fingerprint()
    os.utime(tmp_path / "b.onnx", ns=(2**61, 2**61))
    assert only(tmp_path / "a.onnx").fingerprint() == before
    os.utime(tmp_path / "a.onnx", ns=(2**61, 2**61))
    assert only(tmp_path / "a.onnx").fingerprint() != before


def test_what_is_neither_file_nor_folder_is_no_repository() -> None:
    with pytest.raises(ServingError, match=r"'/dev/null' is no model repository: it is neither a file nor a folder"):
        scan([Path("/dev/null")])


# -- labels


def test_labels_are_the_lines_of_their_file(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat\n\ndög\n", encoding="utf-8")
    assert read_labels(tmp_path, "labels.txt", "Y", "m") == ("cat", "", "dög")


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        (b"a\r\nb\r\n", ("a", "b")),
        (b"page 1\x0cpage 2\nx\rz\n\xe2\x80\xa8", ("page 1\fpage 2", "x\rz", "\u2028")),
        (b"a\n\n", ("a", "")),
        (b"", ()),
    ],
)
def test_labels_end_where_a_line_does_and_nowhere_else(tmp_path: Path, text: bytes, labels: tuple[str, ...]) -> None:
    (tmp_path / "labels.txt").write_bytes(text)
    assert read_labels(tmp_path, "labels.txt", "Y", "m") == labels


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname", "inside/../../secret.txt", "link.txt"])
def test_labels_come_from_inside_the_model_only(tmp_path: Path, name: str) -> None:
    lay(tmp_path, "secret.txt", "m/inside/")
    (tmp_path / "m/link.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ServingError) as caught:
        read_labels(tmp_path / "m", name, "Y", "m")
    assert (caught.value.kind, caught.value.message) == (
        Kind.INVALID,
        f"label file path '{name}' for output 'Y' in model 'm' is outside model directory",
    )


@pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["absent", "not text"])
def test_labels_that_cannot_be_read_are_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "labels.txt").write_bytes(content)
    with pytest.raises(ServingError, match=r"^label file 'labels\.txt' for output 'Y' in model 'm' cannot be read: "):
        read_labels(tmp_path, "labels.txt", "Y", "m")
