"""What is written to folders: whole or not at all, readable, and over nothing of another's."""

import errno
import json
import os
import shutil
import stat
import threading
from contextlib import contextmanager
from pathlib import Path

import foreign
import pytest
import tiny_llama
import tiny_models
import torch
from folders import INDEX, MANIFEST, WEIGHTS, content, full_disk, llama, plain, seed_of
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import liquidgemm
from liquidgemm import LiquidConfig, _files, load_quantized, quantize_, save_quantized
from liquidgemm.cli import demo
from liquidgemm.cli import main as cli

# Permissions.


@contextmanager
def umask(mask: int):
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


def modes(folder: Path) -> tuple[set[int], set[int]]:
    """Of files and of folders, the folder itself among them."""
    paths = [folder, *folder.rglob("*")]
    of = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    files, folders = ({of[p] for p in paths if p.is_dir() == d} for d in (False, True))
    return files, folders


def foreign_checkpoint(tmp_path: Path) -> Path:
    """A Llama whose layers are compressed-tensors, in groups of 128."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            n, k = state.pop(f"{name}.weight").shape
            grid = torch.randint(16, (n, k), dtype=torch.uint8), torch.rand(n, k // 128).half()
            tensors = foreign.compressed_tensors(*grid)
            state |= {f"{name}.{key}": value for key, value in tensors.items()}
    folder = tmp_path / "foreign"
    folder.mkdir()
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = foreign.SETTINGS["compressed-tensors"]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / WEIGHTS)
    return folder


def write_shards(tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liquidgemm.importers.folder, "SHARD_BYTES", 100_000)
    liquidgemm.import_checkpoint(foreign_checkpoint(tmp_path), output, progress=False)
    assert (output / INDEX).exists()


def write_resume(tmp_path: Path, output: Path, _) -> None:
    """Blocks of an interrupted calibration."""
    config, data = LiquidConfig("hessian", gate="off"), tiny_models.batches(1)
    model = tiny_models.make(num_hidden_layers=1)
    quantize_(model, config, calibration=data, resume=output, progress=False)
    assert len(list(output.glob("block-*"))) == 1


def write_report(tmp_path: Path, output: Path, _) -> None:
    pytest.importorskip("matplotlib")
    model = nn.Sequential(nn.Linear(64, 64))
    report = quantize_(model, progress=False)
    output.mkdir()
    report.plot(output / "quantization.png")


def write_demo(tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that the demonstration keeps."""

    def download(folder: Path) -> Path:
        (folder / "model").write_bytes(b"")
        return folder / "model"

    monkeypatch.setattr(demo, "cache_dir", lambda: output)
    monkeypatch.setattr(demo, "download_model", download)
    monkeypatch.setattr(demo, "is_model_file", lambda path: path.exists())
    demo.fetch_model()


def write_by_command(tmp_path: Path, output: Path, _) -> None:
    source = tiny_llama.with_tokenizer(tiny_llama.float_model(tmp_path / "source"))
    result = CliRunner().invoke(cli.app, ["quantize", str(source), "-o", str(output)])
    assert result.exit_code == 0, result.output


def by_save_pretrained(options: dict, loaded: bool):
    def write(tmp_path: Path, output: Path, _) -> None:
        model = llama(tmp_path)
        if loaded:
            model.save_pretrained(tmp_path / "first")
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
        model.save_pretrained(output, **options)

    return write


WRITERS = {
    "save_quantized": lambda _, output, __: save_quantized(plain(), output),
    "save_quantized of transformers": lambda tmp, output, _: save_quantized(llama(tmp), output),
    "save_pretrained": by_save_pretrained({}, False),
    "save_pretrained of a loaded model": by_save_pretrained({}, True),
    "save_pretrained in shards": by_save_pretrained({"max_shard_size": "50KB"}, False),
    "import in shards": write_shards,
    "resume": write_resume,
    "report": write_report,
    "demo": write_demo,
    "command": write_by_command,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_permissions_are_those_of_the_umask(tmp_path, monkeypatch, writer):
    """CHECKLIST 26: so that a server under another user can read a model, or must not."""
    for mask in (0o022, 0o077):
        here = tmp_path / oct(mask)
        here.mkdir()
        with umask(mask):
            WRITERS[writer](here, here / "out", monkeypatch)
        assert modes(here / "out") == ({0o666 & ~mask}, {0o777 & ~mask})


# Failures and interruptions.


@pytest.mark.parametrize("before", ["nothing", "a checkpoint"])
@pytest.mark.parametrize("kind", ["plain", "transformers"])
def test_a_full_disk_is_an_oserror_and_leaves_what_was_there(tmp_path, kind, before):
    """CHECKLIST 26, 28."""
    model = plain() if kind == "plain" else llama(tmp_path)
    output = tmp_path / "out"
    output.mkdir()
    if before != "nothing":
        save_quantized(plain(1) if kind == "plain" else llama(tmp_path, 1), output)
        (output / "tokenizer.json").write_text("mine")
        (output / "sub").mkdir()
        (output / "sub/notes").write_text("mine")
    there = content(output)
    with full_disk(), pytest.raises(OSError, match="safetensors") as caught:
        save_quantized(model, output)
    assert caught.value.errno == errno.EFBIG
    assert content(output) == there


def test_the_import_on_a_full_disk(tmp_path):
    """CHECKLIST 26, 28."""
    source = foreign_checkpoint(tmp_path)
    with full_disk(), pytest.raises(OSError, match="safetensors"):
        liquidgemm.import_checkpoint(source, tmp_path / "new/out", progress=False)
    assert not (tmp_path / "new").exists()


def test_resuming_on_a_full_disk(tmp_path):
    """CHECKLIST 26, 28: the first block is not half there."""
    with full_disk(), pytest.raises(OSError, match="safetensors"):
        write_resume(tmp_path, tmp_path / "out", None)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["calibration.json"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("calibration.json", b"{"),
        ("calibration.json", b"[1]"),
        ("block-0000.safetensors", b"half"),
    ],
)
def test_damaged_files_of_an_interrupted_calibration(tmp_path, name, data):
    """CHECKLIST 28: an error that names the file."""
    write_resume(tmp_path, tmp_path / "out", None)
    (tmp_path / "out" / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"resume: .*{name}: truncated or damaged"):
        write_resume(tmp_path, tmp_path / "out", None)


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()], ids=type)
@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("at", range(5))
def test_an_interruption_between_files_puts_the_old_ones_back(
    tmp_path, monkeypatch, error, links, at
):
    """CHECKLIST 26: four files replace a checkpoint in shards; whichever of them fails."""
    output = tmp_path / "out"
    llama(tmp_path, 1).save_pretrained(output, max_shard_size="50KB")
    there = content(output)
    model, calls, replace = llama(tmp_path, 2), [], os.replace

    def failing(source, target):
        if Path(source).parent.name.startswith(".saving-"):
            calls.append(target)
            if len(calls) == at + 1:
                raise error
        replace(source, target)

    def no_links(*_):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "replace", failing)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    if at == 4:
        save_quantized(model, output)
        assert seed_of(load_quantized(output)) == 2
        return
    with pytest.raises(type(error)):
        save_quantized(model, output)
    assert content(output) == there
    assert seed_of(load_quantized(output)) == 1


def test_a_new_folder_takes_no_place_of_another(tmp_path):
    """CHECKLIST 26: whole in an absent or empty folder, also behind a link; else refused."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "target")
    (tmp_path / "file").touch()
    (tmp_path / "full/sub").mkdir(parents=True)
    for name, written in [("link", "empty"), ("dangling", "target"), ("a/b/c", "a/b/c")]:
        with _files.new_folder(tmp_path / name) as staging:
            (staging / "sub").mkdir()
            (staging / "sub/file").write_text(name)
        assert content(tmp_path / written) == {"sub/file": name.encode()}
        assert (tmp_path / name).is_symlink() == (name != written)
    for name in ("link", "empty", "full", "file", "a"):
        with (
            pytest.raises(FileExistsError, match="choose another"),
            _files.new_folder(tmp_path / name),
        ):
            pytest.fail("nothing is to be computed")
    assert not list(tmp_path.rglob(".saving-*"))


def test_an_empty_working_directory_can_be_written_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with _files.new_folder(".") as staging:
        (staging / "file").touch()
    assert os.listdir() == ["file"]


# Over nothing of another's.


def float_shards(tmp_path: Path, folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama.float_model(tmp_path / "f"))
    model.save_pretrained(folder, max_shard_size="50KB")


def float_over_ours(tmp_path: Path, folder: Path) -> None:
    save_quantized(llama(tmp_path), folder)
    LlamaForCausalLM.from_pretrained(tmp_path / "float").save_pretrained(folder)


@pytest.mark.parametrize(
    "write",
    [
        lambda tmp, folder: tiny_llama.float_model(folder),
        float_shards,
        float_over_ours,
        lambda tmp, folder: shutil.copytree(foreign_checkpoint(tmp), folder),
    ],
    ids=["float", "shards", "float over ours", "foreign"],
)
def test_another_models_files_are_not_replaced(tmp_path, write):
    """CHECKLIST 26: the float model above all."""
    write(tmp_path, tmp_path / "out")
    there = content(tmp_path / "out")
    with pytest.raises(FileExistsError, match="choose another folder"):
        save_quantized(llama(tmp_path), tmp_path / "out")
    assert content(tmp_path / "out") == there


def test_what_is_no_part_of_the_checkpoint_stays(tmp_path):
    """CHECKLIST 26: subfolders, a tokenizer, a float model beside a plain checkpoint."""
    tiny_llama.float_model(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/model.safetensors").write_text("mine")
    there = content(tmp_path)
    for seed in (0, 1):
        save_quantized(plain(seed), tmp_path)
    written = content(tmp_path)
    assert {name: written[name] for name in there} == there
    assert written.keys() - there.keys() == {MANIFEST, "liquidgemm.safetensors"}


def test_writers_do_not_need_the_main_thread(tmp_path):
    thread = threading.Thread(target=save_quantized, args=(plain(), tmp_path / "out"))
    thread.start()
    thread.join()
    assert modes(tmp_path / "out")[0] == {0o666 & ~_umask()}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
