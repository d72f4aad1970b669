"""Damaged checkpoints and configs, and what the loaders have to make of them.

Everything is drawn from a `random.Random`, so that a seed reproduces a case.
"""

import copy
import hashlib
import json
import random
import string
from pathlib import Path

import torch
from torch import Tensor, nn

from liquidgemm import LiquidConfig, LiquidLinear, load_quantized, quantize_, save_quantized

MANIFEST, WEIGHTS = "liquidgemm.json", "liquidgemm.safetensors"
REFUSALS = (ValueError, FileNotFoundError)  # what `load_quantized` promises to raise

# Independent of the loader: the types of the safetensors format.
DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "BOOL": torch.bool,
}


class Net(nn.Module):
    """Quantized layers of every format, some with a last group that is not full; tied tensors; a
    buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 70)
        self.down = nn.Linear(70, 5, bias=False)
        self.fine = nn.Linear(70, 3)
        self.six = nn.Linear(5, 3, bias=False)
        self.eight = nn.Linear(70, 3)
        self.norm = nn.LayerNorm(5)
        self.embed = nn.Embedding(4, 5)
        self.lm_head = nn.Linear(5, 4, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("step", torch.tensor(3))


LAYERS = ("up.", "down.", "fine.", "six.", "eight.")


def quantized_net(seed: int) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net()
    net.up, net.down = LiquidLinear.from_linear(net.up), LiquidLinear.from_linear(net.down)
    config = LiquidConfig(group_size=32, bits={"six": 6, "eight": 8})
    quantize_(net, config, progress=False, verify=False)
    return net


# Mutations of bytes.


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One of: flipped bits, cut short, lengthened, a span removed, repeated or overwritten."""
    if not data:
        return rng.randbytes(rng.randrange(1, 9))
    at = rng.randrange(len(data))
    span = rng.randrange(1, 1 + min(64, len(data) - at))
    kind = rng.randrange(6)
    if kind == 0:
        mutated = bytearray(data)
        for _ in range(rng.randrange(1, 9)):
            mutated[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(mutated)
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data + rng.randbytes(rng.randrange(1, 99))
    if kind == 3:
        return data[:at] + data[at + span :]
    if kind == 4:
        return data[: at + span] + data[at:]
    return data[:at] + rng.randbytes(span) + data[at + span :]


# Mutations of JSON.


def random_json(rng: random.Random, depth: int = 0) -> object:
    kind = rng.randrange(11 if depth < 3 else 8)
    if kind < 3:
        numbers = (0, 1, -1, 2, 5, 64, 70, 2**31, 2**63, 10**30, 0.5, 1e308, float("nan"))
        return rng.choice([*numbers, float("inf")])
    if kind < 4:
        return rng.choice([True, False, None])
    if kind < 8:
        known = ["up", "down.qscale", "norm", "search", "U8", "F32", "../x", "", "\u2028", "\x00"]
        return rng.choice([*known, "".join(rng.choices(string.printable, k=rng.randrange(9)))])
    if kind < 10:
        return [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    names = [str(random_json(rng, 3)) for _ in range(rng.randrange(4))]
    return {name: random_json(rng, depth + 1) for name in names}


def places(value: object) -> list[tuple[dict | list, object]]:
    """Container and key of everything inside a JSON value."""
    if isinstance(value, dict):
        inside = list(value.items())
    elif isinstance(value, list):
        inside = list(enumerate(value))
    else:
        return []
    return [place for key, child in inside for place in [(value, key), *places(child)]]


def mutate_json(value: object, rng: random.Random) -> object:
    """A copy with one to three parts replaced, removed, renamed, exchanged, added, or equal but of
    another type."""
    value = copy.deepcopy(value)
    for _ in range(rng.randrange(1, 4)):
        inside = places(value)
        if not inside:
            return random_json(rng)
        container, key = rng.choice(inside)
        kind = rng.randrange(7)
        if kind < 2:
            container[key] = random_json(rng)
        elif kind == 2:
            del container[key]
        elif kind == 6:
            part = container[key]
            if isinstance(part, int):
                container[key] = int(part) if type(part) is bool else float(part)
        elif kind == 3:
            other, other_key = rng.choice(inside)
            container[key] = copy.deepcopy(other[other_key])
        elif isinstance(container, dict):
            name = str(random_json(rng, 3))
            container[name] = container.pop(key) if kind == 4 else random_json(rng)
        else:
            container.insert(rng.randrange(len(container) + 1), random_json(rng))
    return value


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The same file with another header, or with other data behind it."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = rng.randrange(4)
    if kind == 0:
        return data[: 8 + length] + mutate_bytes(body, rng)
    if kind == 1:
        header = mutate_bytes(header, rng)
    elif kind == 2:
        wrong = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
        return wrong.to_bytes(8, "little") + header + body
    else:
        entries = mutate_json(json.loads(header), rng)
        if isinstance(entries, dict) and rng.random() < 0.5:
            for entry in rng.sample(list(entries.values()), k=min(1, len(entries))):
                if isinstance(entry, dict):
                    entry["dtype"] = rng.choice([*DTYPES, "F8_E4M3", "?"])
        header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + body


# Checkpoints.


class Checkpoint:
    """A good checkpoint, a model to load damaged copies of it into, and the judgement."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_quantized(quantized_net(0), folder)
        self.manifest = (folder / MANIFEST).read_bytes()
        self.weights = (folder / WEIGHTS).read_bytes()
        self.target = quantized_net(1)
        self.before = snapshot(self.target)
        self.modules = list(self.target.modules())

    def damage(self, rng: random.Random) -> str:
        """Writes a damaged copy; says what was done."""
        manifest, weights = self.manifest, self.weights
        kind = rng.choice(
            [
                "weights",
                "weights",
                "hashed weights",
                "hashed weights",
                "manifest",
                "fields",
                "fields",
                "both",
            ]
        )
        if kind == "weights":
            weights = mutate_bytes(weights, rng)
        elif kind == "manifest":
            manifest = mutate_bytes(manifest, rng)
        else:
            fields = json.loads(manifest)
            if kind != "fields":  # with a hash that fits, as no accident would have it
                weights = mutate_safetensors(weights, rng)
                fields["sha256"] = hashlib.sha256(weights).hexdigest()
            if kind in ("fields", "both"):
                fields = mutate_json(fields, rng)
            manifest = json.dumps(fields).encode()
        (self.folder / MANIFEST).write_bytes(manifest)
        (self.folder / WEIGHTS).write_bytes(weights)
        return kind

    def check(self) -> bool:
        """Whether the folder is accepted.

        Raises:
            AssertionError: wrongly, or refused with the model changed.
            Exception: refused with an error other than those that are promised.
        """
        try:
            load_quantized(self.folder, model=self.target)
        except REFUSALS:
            assert_equal_states(snapshot(self.target), self.before)
            assert list(self.target.modules()) == self.modules
            return False
        manifest = json.loads((self.folder / MANIFEST).read_text())
        assert manifest["format"] == "liquidgemm"
        assert type(manifest["format_version"]) is int
        state = read_safetensors((self.folder / WEIGHTS).read_bytes())
        assert not manifest["aliases"].keys() & state.keys(), "two meanings for one name"
        state.update((key, state[original]) for key, original in manifest["aliases"].items())
        loaded = snapshot(self.target)
        assert_equal_states(loaded, {key: as_like(state[key], loaded[key]) for key in loaded})
        assert state.keys() == loaded.keys()
        if manifest["config"] is not None:
            expected = LiquidConfig.from_json(json.dumps(manifest["config"]))
            assert self.target.liquid_config == expected
        self.target.load_state_dict(self.before)
        return True


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal_states(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert actual[key].shape == value.shape, key
        same = actual[key].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)
        assert torch.equal(*same), key


def as_like(stored: Tensor, loaded: Tensor) -> Tensor:
    """What loading makes of a stored tensor: other sizes of float are converted, nothing else."""
    assert stored.is_floating_point() == loaded.is_floating_point(), (stored.dtype, loaded.dtype)
    assert stored.is_floating_point() or stored.dtype == loaded.dtype, (stored.dtype, loaded.dtype)
    return stored.to(loaded.dtype)


def read_safetensors(data: bytes) -> dict[str, Tensor]:
    """A reader of our own, to hold the library's against."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        dtype = DTYPES[entry["dtype"]]
        flat = torch.frombuffer(bytearray(body[begin:end] or b"\0" * 8), dtype=dtype)
        tensors[name] = flat[: (end - begin) // dtype.itemsize].view(entry["shape"])
    return tensors


def check_checkpoints(folder: Path, count: int, seed: int) -> int:
    """Damages a checkpoint this many times; returns how often it was, rightly, accepted."""
    checkpoint = Checkpoint(folder)
    accepted = 0
    for case in range(count):
        rng = random.Random(f"{seed}-{case}")
        what = checkpoint.damage(rng)
        try:
            accepted += checkpoint.check()
        except Exception as error:
            raise AssertionError(f"seed {seed}, case {case}, {what}: {error!r}") from error
    return accepted


# Configs and states.


def check_configs(count: int, seed: int) -> int:
    """Damages the JSON of a LiquidConfig this many times; returns how often it was accepted."""
    full = LiquidConfig("gptq", 128, ("a", "b.*"), ("c",), {"d": 64}, {"norm": ("q", "k")}, True)
    accepted = 0
    for case in range(count):
        rng = random.Random(f"{seed}-{case}")
        text = full.to_json() if rng.random() < 0.7 else LiquidConfig().to_json()
        if rng.random() < 0.3:
            text = mutate_bytes(text.encode(), rng).decode(errors="replace")
        else:
            text = json.dumps(mutate_json(json.loads(text), rng))
        try:
            config = LiquidConfig.from_json(text)
        except ValueError:
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}, case {case}: {text}: {error!r}") from error
        again = LiquidConfig.from_json(config.to_json())
        assert again == config, f"seed {seed}, case {case}: {text}"
        accepted += 1
    return accepted


def check_states(count: int, seed: int) -> int:
    """Damages a state_dict this many times; returns how often it was accepted."""
    target = quantized_net(1)
    good, before = snapshot(quantized_net(0)), snapshot(target)
    accepted = 0
    for case in range(count):
        rng = random.Random(f"{seed}-{case}")
        state = dict(good)
        for _ in range(rng.randrange(1, 3)):
            key = rng.choice([k for k in state if k.startswith(LAYERS)])
            state[key] = mutate_tensor(state[key], rng)
        try:
            target.load_state_dict(state)
        except RuntimeError:
            pass
        except Exception as error:
            raise AssertionError(f"seed {seed}, case {case}: {error!r}") from error
        else:
            accepted += 1
            loaded = snapshot(target)
            expected = {key: as_like(state[key], loaded[key]) for key in loaded}
            try:
                assert_equal_states(loaded, expected)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, case {case}: {error!r}") from error
            target.load_state_dict(before)
            continue
        # A layer whose state is bad is as it was; torch itself has filled the others.
        target.load_state_dict(before)
    return accepted


def mutate_tensor(t: Tensor, rng: random.Random) -> Tensor:
    kind = rng.randrange(6)
    if kind == 0:
        return t.to(rng.choice(list(DTYPES.values())))
    if kind == 1:
        return t[: rng.randrange(len(t) + 1)] if t.dim() else t
    if kind == 2:
        return t.unsqueeze(rng.randrange(t.dim() + 1))
    if kind == 3:
        return t.repeat(2, *[1] * (t.dim() - 1)) if t.dim() else t
    if kind == 4:
        return t.T.contiguous() if t.dim() == 2 else t.flip(0) if t.dim() else t
    changed = t.clone().reshape(-1).view(torch.uint8)
    if not len(changed):
        return t
    for _ in range(rng.randrange(1, 9)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return changed.view(t.dtype).view(t.shape)
