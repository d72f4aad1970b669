"""Which files of a folder an import reads, and which it keeps."""

import json
import os

import pytest
import torch
from foreign import packed, write
from safetensors.torch import load_file, save_file

from liquidgemm import import_checkpoint

INDEX = "model.safetensors.index.json"


def checkpoint(folder):
    tensors, settings, _ = packed("awq", 128)
    return write(folder, {"a.b": tensors, "c": tensors}, settings)


def shards(folder, suffix="safetensors"):
    """The same in two files with an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    weight_map = {}
    for part, keys in enumerate((names[:2], names[2:])):
        file = f"{stem}-0000{part + 1}-of-00002.{suffix}"
        tensors = {key: state[key] for key in keys}
        if suffix == "bin":
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(keys, file)
    index(folder, weight_map, f"{stem}.{suffix}.index.json")
    return weight_map


def index(folder, weight_map, name=INDEX):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def stale(folder, name):
    """A file with other values under the same names."""
    state = load_file(folder / "../fresh/model.safetensors")
    save_file({key: torch.full_like(t, 3) for key, t in state.items()}, folder / name)


@pytest.fixture
def fresh(tmp_path):
    """A sound folder, and the tensors of its import."""
    source = checkpoint(tmp_path / "fresh")
    import_checkpoint(source, tmp_path / "expected", progress=False)
    return load_file(tmp_path / "expected/model.safetensors")


def assert_imports(folder, expected):
    before = {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")}
    report = import_checkpoint(folder, folder.parent / f"{folder.name}-out", progress=False)
    after = {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")}
    assert before == after
    state = load_file(folder.parent / f"{folder.name}-out/model.safetensors")
    assert state.keys() == expected.keys()
    assert all(state[key].equal(expected[key]) for key in state)
    return report


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("more", [[], ["model.safetensors"], ["old.safetensors", "z.safetensors"]])
def test_a_tensor_comes_from_the_file_that_the_index_names(tmp_path, fresh, suffix, more):
    source = checkpoint(tmp_path / "source")
    shards(source, suffix)
    if suffix == "bin":
        more = [f"pytorch_model_{name.replace('safetensors', 'bin')}" for name in more]
        state = load_file(tmp_path / "fresh/model.safetensors")
        for name in more:
            torch.save({key: torch.full_like(t, 3) for key, t in state.items()}, source / name)
    else:
        for name in more:
            stale(source, name)
    report = assert_imports(source, fresh)
    assert list(report.notes) == ([f"left out: {', '.join(sorted(more))}"] if more else [])


def test_a_name_in_two_shards_comes_from_the_right_one(tmp_path, fresh):
    source = checkpoint(tmp_path / "source")
    weight_map = shards(source)
    name, file = next(iter(weight_map.items()))
    other = next(f for f in weight_map.values() if f != file)
    state = load_file(source / other)
    save_file({**state, name: torch.zeros_like(load_file(source / file)[name])}, source / other)
    assert_imports(source, fresh)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_files_that_are_not_of_the_model(tmp_path, fresh, name):
    source = checkpoint(tmp_path / "source")
    stale(source, name)
    assert f"left out: {name}" in assert_imports(source, fresh).notes


def test_the_hub_keeps_files_behind_links(tmp_path, fresh):
    source = checkpoint(tmp_path / "source")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    shards(source)
    for number, file in enumerate(sorted(source.iterdir())):
        os.replace(file, blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), source))
    assert_imports(source, fresh)
    assert not any(path.is_symlink() for path in (tmp_path / "source-out").iterdir())


def damage(folder, how):
    weight_map = shards(folder)
    name, file = next(iter(weight_map.items()))
    changed = {
        "no such file": {**weight_map, name: "other.safetensors"},
        "no such tensor": {**weight_map, "more": file},
        "another folder": {**weight_map, name: "../fresh/model.safetensors"},
        "no map": None,
        "no files": list(weight_map),
        "no names": dict.fromkeys(weight_map, 3),
    }
    index(folder, changed[how])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no such file", r"is missing, though model\.safetensors\.index\.json .*other"),
        ("no such tensor", "more is missing, though model"),
        ("another folder", "expected the name of a file"),
        ("no map", "expected a weight_map"),
        ("no files", "expected a weight_map"),
        ("no names", "expected a weight_map"),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path, fresh, how, message):
    source = checkpoint(tmp_path / "source")
    damage(source, how)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_without_an_index_one_name_in_two_files_is_refused(tmp_path, fresh):
    source = checkpoint(tmp_path / "source")
    stale(source, "z-old.safetensors")
    with pytest.raises(ValueError, match=r"z-old\.safetensors: expected each tensor in one file"):
        import_checkpoint(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_two_indices_of_which_none_is_the_usual_one_are_refused(tmp_path, fresh):
    source = checkpoint(tmp_path / "source")
    weight_map = dict.fromkeys(load_file(source / "model.safetensors"), "model.safetensors")
    for name in ("x.safetensors.index.json", "y.safetensors.index.json"):
        index(source, weight_map, name)
    with pytest.raises(ValueError, match="expected one index, got x"):
        import_checkpoint(source, tmp_path / "out", progress=False)
    (source / "x.safetensors.index.json").rename(source / INDEX)
    assert_imports(source, fresh)


def test_tensors_that_the_index_forgets_are_said(tmp_path, fresh):
    source = checkpoint(tmp_path / "source")
    weight_map = shards(source)
    del weight_map["norm.weight"]
    index(source, weight_map)
    (note,) = assert_imports(source, fresh).notes
    assert note == f"not in {INDEX}, but in the files that it names: norm.weight"


def test_weights_of_another_kind_are_named(tmp_path):
    source = checkpoint(tmp_path / "source")
    (source / "model.safetensors").rename(source / "model.pt")
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.safetensors .*, but model\.pt"):
        import_checkpoint(source, tmp_path / "out", progress=False)


def test_an_adapter_is_refused(tmp_path):
    source = checkpoint(tmp_path / "source")
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a model, got one with an adapter"):
        import_checkpoint(source, tmp_path / "out", progress=False)


def test_folders_below_are_kept_without_their_weights(tmp_path, fresh):
    source = checkpoint(tmp_path / "source")
    for name in ("1_Pooling/config.json", "1_Pooling/more/vocab.txt", "onnx/model.onnx", ".git/x"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    report = assert_imports(source, fresh)
    out = tmp_path / "source-out"
    assert (out / "1_Pooling/config.json").read_text() == "1_Pooling/config.json"
    assert (out / "1_Pooling/more/vocab.txt").exists()
    assert not (out / "onnx").exists()
    assert not (out / ".git").exists()
    assert report.notes == ("left out: onnx/model.onnx",)


def test_the_output_is_not_within_the_source(tmp_path, fresh):
    source = checkpoint(tmp_path / "source")
    with pytest.raises(FileExistsError, match="expected a folder outside of"):
        import_checkpoint(source, source / "out", progress=False)
    assert sorted(path.name for path in source.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


# What is in a folder besides files, and what is no folder.


def link_to_a_folder(source):
    (source / "../elsewhere").mkdir()
    (source / "../elsewhere/tokenizer.json").write_text("{}")
    (source / "linked").symlink_to(source / "../elsewhere")


@pytest.mark.parametrize(
    ("prepare", "left"),
    [
        (link_to_a_folder, "linked/"),
        (lambda source: (source / "round").symlink_to(source), "round/"),
        (lambda source: (source / "gone.json").symlink_to("nowhere"), "gone.json"),
        (lambda source: os.mkfifo(source / "pipe"), "pipe"),
    ],
    ids=["link to a folder", "link to itself", "dangling link", "pipe"],
)
def test_what_is_no_file_is_left_out_and_said(tmp_path, fresh, prepare, left):
    source = checkpoint(tmp_path / "source")
    prepare(source)
    assert f"left out: {left}" in assert_imports(source, fresh).notes
    assert not (tmp_path / "source-out" / left).exists()


def test_links_to_files_are_read(tmp_path, fresh):
    """As in the hub's cache."""
    source = checkpoint(tmp_path / "source")
    (tmp_path / "blobs").mkdir()
    for file in list(source.iterdir()):
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(tmp_path / "blobs" / file.name)
    assert_imports(source, fresh)
    assert not (tmp_path / "source-out/tokenizer.json").is_symlink()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "[" * 100_000, "truncated or damaged"),
        ("config.json", '{"a": {"bits": 4, "bits": 8}}', "each key once, got 'bits' several"),
        ("config.json", "{}".encode("utf-16"), "truncated or damaged"),
        ("config.json", None, "expected a file, got a folder"),
        ("quantize_config.json", '{"bits": 4, "bits": 8}', "each key once, got 'bits' several"),
        (INDEX, '{"weight_map": {"a": "b", "a": "c"}}', "each key once, got 'a' several"),
    ],
)
def test_json_that_is_none_or_says_two_things(tmp_path, name, text, message):
    source = checkpoint(tmp_path / "source")
    (source / name).unlink(missing_ok=True)
    if text is None:
        (source / name).mkdir()
    else:
        (source / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        import_checkpoint(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["file/below", "nowhere"])
def test_a_source_that_is_no_folder(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=r"config\.json: .*expected a model folder"):
        import_checkpoint(tmp_path / name, tmp_path / "out", progress=False)


def test_a_source_that_is_another_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: expected a folder or a GGUF file"):
        import_checkpoint(tmp_path / "file", tmp_path / "out", progress=False)


def test_an_output_in_the_way_is_refused_before_anything_is_read(tmp_path):
    source = checkpoint(tmp_path / "source")
    (source / "model.safetensors").write_bytes(b"damaged")
    (tmp_path / "file").touch()
    for output in (source, source / "out", tmp_path / "file", tmp_path / "file/below/out"):
        with pytest.raises(FileExistsError, match="choose another"):
            import_checkpoint(source, output, progress=False)


def test_the_home_directory_by_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    checkpoint(tmp_path / "source")
    import_checkpoint("~/source", "~/out", progress=False)
    assert (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize("prefix", ["", "."])
def test_tensors_without_the_name_of_a_layer(tmp_path, prefix):
    source = checkpoint(tmp_path / "source")
    tensors, _, _ = packed("awq", 128)
    save_file({f"{prefix}{k}": t for k, t in tensors.items()}, source / "model.safetensors")
    with pytest.raises(ValueError, match="expected a tensor of a layer, got one without its name"):
        import_checkpoint(source, tmp_path / "out", progress=False)


@pytest.mark.parametrize("key", ["d.weight", "d.bias", "weight"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_weight_in_yet_another_format_is_not_copied(tmp_path, key, dtype):
    """Its numbers are not its values."""
    source = checkpoint(tmp_path / "source")
    state = load_file(source / "model.safetensors")
    save_file({**state, key: torch.ones(4, 4).to(dtype)}, source / "model.safetensors")
    with pytest.raises(ValueError, match=f"{key}: expected floats, as it is not of a layer of 4"):
        import_checkpoint(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_buffers_of_integers_are_kept(tmp_path):
    source = checkpoint(tmp_path / "source")
    state = load_file(source / "model.safetensors")
    more = {"position_ids": torch.arange(4), "d.steps": torch.tensor(3, dtype=torch.uint8)}
    more["e.weight"] = torch.ones(2, 2, dtype=torch.float64)
    save_file({**state, **more}, source / "model.safetensors")
    import_checkpoint(source, tmp_path / "out", progress=False)
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(written[key].equal(value) for key, value in more.items())
