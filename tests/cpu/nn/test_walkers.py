"""CHECKLIST 27: libraries that walk over a model by the names of its state_dict.

They get the right result or an error: torch.func, distributed checkpoints, wrappers, accelerate's
dispatch and offload, copies.
"""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from reference import assert_same
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import stateless
from torch.optim import swa_utils

from liquidgemm import LiquidConfig, LiquidLinear, quantize_

X = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))


def quantized(seed=0, augment=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(100, 64), nn.ReLU(), nn.Linear(64, 40), nn.LayerNorm(40))
    quantize_(model, LiquidConfig(augment=augment), progress=False)
    return model.eval()


def blank(device=None, augment=0):
    """Of the same structure, with other values or none."""
    return nn.Sequential(
        LiquidLinear(100, 64, device=device, augment=augment),
        nn.ReLU(),
        LiquidLinear(64, 40, device=device, augment=augment),
        nn.LayerNorm(40, device=device),
    ).eval()


@pytest.fixture(params=[0, 64], ids=["plain", "residual columns"])
def augment(request):
    return request.param


def assert_equal(model, expected):
    """Outputs and state, before and after the layers pack what they were given."""
    for _ in range(2):
        assert_same(model(X), expected(X))
        assert model.state_dict().keys() == expected.state_dict().keys()
        for key, value in expected.state_dict().items():
            assert_same(model.state_dict()[key], value, key=key)
        model.eval()
    assert {name for name, _ in model.named_buffers()} == {
        name for name, _ in expected.named_buffers()
    }


def test_every_key_is_an_attribute(augment):
    """CHECKLIST 27: and a name of the buffers."""
    model = quantized(0, augment)
    for key, value in model.state_dict().items():
        name, _, attribute = key.rpartition(".")
        module = model.get_submodule(name)
        assert_same(getattr(module, attribute), value, key=key)
        assert attribute in module._parameters or attribute in module._buffers, key


# torch.func.


@pytest.mark.parametrize("call", [functional_call, stateless._functional_call])
def test_functional_call_computes_with_what_it_is_given(call, augment):
    """CHECKLIST 27: and leaves the layer as it was."""
    model, other = quantized(0, augment), quantized(1, augment)
    packed, expected = model[0].packed, model(X)
    assert_same(call(model, other.state_dict(), (X,)), other(X))
    assert model[0].packed is packed
    assert_same(model(X), expected)
    assert_equal(model, quantized(0, augment))


@pytest.mark.parametrize("device", [None, "meta"])
def test_functional_call_of_a_skeleton(device, augment):
    model = quantized(0, augment)
    for skeleton in (blank(device, augment), quantized(1, augment).to(device)):
        before = skeleton.state_dict()
        assert_same(functional_call(skeleton, model.state_dict(), (X,)), model(X))
        buffers = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert_same(functional_call(skeleton, buffers, (X,)), model(X))
        for key, value in skeleton.state_dict().items():
            assert value.device == before[key].device
            if device is None:
                assert_same(value, before[key])


def test_functional_call_with_one_tensor():
    model = quantized()
    changed = {"0.qweight": model[0].qweight ^ 0x11}
    expected = quantized()
    expected.load_state_dict(expected.state_dict() | changed)
    assert_same(functional_call(model, changed, (X,)), expected(X))
    assert not torch.equal(expected(X), model(X))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("qscale", torch.full((64, 2), 255, dtype=torch.uint8), "infeasible"),
        ("qweight", torch.zeros(64, 64), "qweight: expected dtype uint8"),
        ("qweight", torch.zeros(64, 32, dtype=torch.uint8), "expected shape"),
        ("qweight", torch.zeros(64, 64, dtype=torch.uint8, device="meta"), "expected on"),
        ("weight", torch.zeros(64, 100), "weight"),
    ],
)
def test_functional_call_refuses_what_does_not_fit(name, tensor, message):
    model = quantized()
    with pytest.raises((RuntimeError, TypeError), match=message):
        functional_call(model, {f"0.{name}": tensor}, (X,))
    assert_equal(model, quantized())


def test_functional_call_in_one_graph():
    model, other = quantized(0), quantized(1)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda state, x: functional_call(model, state, (x,)), backend="aot_eager", fullgraph=True
    )
    for expected in (model, other):
        assert_same(compiled(expected.state_dict(), X), expected(X))


def test_an_ensemble():
    """As torch's tutorial has it: stacked states and a skeleton on the meta device."""
    models = [quantized(seed) for seed in range(3)]
    skeleton = copy.deepcopy(models[0]).to("meta")
    parameters, buffers = stack_module_state(models)
    got = vmap(lambda p, b: functional_call(skeleton, (p, b), (X,)))(parameters, buffers)
    for model, y in zip(models, got, strict=True):
        assert torch.allclose(y, model(X), atol=1e-6)  # the LayerNorm is torch's


# Attributes.


def test_assigned_tensors_are_computed_with():
    """CHECKLIST 27."""
    model, other = quantized(0), quantized(1)
    for name in ("qweight", "qscale", "qoffset", "scale", "bias"):
        setattr(model[0], name, getattr(other[0], name))
    model[2], model[3] = other[2], other[3]
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(copied, other)
    model[0].qweight = other[0].qweight ^ 0x11
    assert not torch.equal(model(X), other(X))
    torch._dynamo.reset()
    assert_same(torch.compile(model, backend="aot_eager", fullgraph=True)(X), model(X))
    model[0].qweight = None
    assert_equal(model, other)
    model[0].qweight = other[0].qweight ^ 0x11
    model.load_state_dict(other.state_dict())
    assert_equal(model, other)


@pytest.mark.parametrize("move", [lambda m: m.eval(), lambda m: m.to("cpu"), lambda m: m.float()])
def test_assigned_tensors_are_packed_for_good(move):
    layer = quantized()[0]
    layer.qweight = layer.qweight ^ 0x11
    expected = layer(X)
    move(layer)
    assert [name for name, _ in layer.named_buffers()] == ["packed", "scale", "bias"]
    assert_same(layer(X), expected)


def test_what_is_read_is_a_copy():
    layer = quantized()[0]
    before = layer(X)
    layer.qweight.zero_()
    layer.state_dict()["qweight"].zero_()
    assert_same(layer(X), before)


# Checkpoints and wrappers of torch.


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strict": False},
        {"full_state_dict": True, "cpu_offload": True},
        {"full_state_dict": True, "broadcast_from_rank0": True},
    ],
)
def test_distributed_checkpoint(tmp_path, options, augment):
    """CHECKLIST 27."""
    model, other = quantized(0, augment), blank(augment=augment)
    state = get_model_state_dict(model)
    assert state.keys() == model.state_dict().keys()
    dcp.save(state, checkpoint_id=tmp_path)
    loaded = get_model_state_dict(other)
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_model_state_dict(other, loaded, options=StateDictOptions(**options))
    assert_equal(other, model)


@pytest.mark.usefixtures("process_group")
def test_prefixes_of_wrappers():
    """CHECKLIST 27."""
    model = quantized()
    torch._dynamo.reset()
    for wrap in (
        lambda m: torch.compile(m, backend="eager"),
        DistributedDataParallel,
        nn.DataParallel,
        fully_shard,
        swa_utils.AveragedModel,
    ):
        wrapped, other = wrap(quantized()), wrap(blank())
        assert_same(wrapped(X), model(X))
        other.load_state_dict(wrapped.state_dict())
        assert_same(other(X), model(X))
        if wrap not in (nn.DataParallel, swa_utils.AveragedModel):  # whose prefix torch keeps
            assert get_model_state_dict(wrapped).keys() == model.state_dict().keys()


@pytest.mark.parametrize("average", [{}, {"avg_fn": swa_utils.get_ema_avg_fn(0.9)}])
def test_averages_of_parameters(average):
    model = quantized()
    averaged = swa_utils.AveragedModel(model, **average)
    for _ in range(3):
        with torch.no_grad():
            model[3].weight += 1
        averaged.update_parameters(model)
    assert_same(averaged.module[0].packed, model[0].packed)
    assert not torch.equal(averaged(X), model(X))


# accelerate.


@pytest.fixture
def accelerate():
    return pytest.importorskip("accelerate", reason="accelerate is not installed")


@pytest.fixture
def checkpoint(tmp_path, augment):
    save_file(quantized(0, augment).state_dict(), tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


EACH = {"0": "cpu", "1": "cpu", "2": "cpu", "3": "cpu"}
PART_ON_DISK = {"0": "cpu", "1": "cpu", "2": "disk", "3": "disk"}


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": {"": "cpu"}},
        {"device_map": {"": "cpu"}, "force_hooks": True},
        {"device_map": {"": "cpu"}, "offload_state_dict": True},
        {"device_map": EACH, "force_hooks": True},
        {"device_map": "auto", "max_memory": {"cpu": "1GiB"}},
        {"device_map": PART_ON_DISK, "offload_buffers": True},
    ],
)
@pytest.mark.parametrize("skeleton", ["meta", "buffers in memory", "live"])
def test_load_checkpoint_and_dispatch(accelerate, checkpoint, tmp_path, augment, options, skeleton):
    """CHECKLIST 27."""
    if skeleton == "live":
        model = quantized(1, augment)
    else:
        with accelerate.init_empty_weights(include_buffers=skeleton == "meta"):
            model = blank(augment=augment)
    accelerate.load_checkpoint_and_dispatch(
        model, checkpoint, offload_folder=tmp_path / "offload", **options
    )
    expected = quantized(0, augment)
    for _ in range(2):
        assert_same(model(X), expected(X))
        model.eval()


@pytest.mark.parametrize("skeleton", [True, False])
def test_buffers_that_are_not_offloaded(accelerate, checkpoint, tmp_path, augment, skeleton):
    """With its defaults accelerate neither loads nor offloads them: an error, and no zeros."""
    with accelerate.init_empty_weights(include_buffers=skeleton):
        model = blank(augment=augment)
    with pytest.raises(ValueError, match="is on the meta device, we need a `value`"):
        accelerate.load_checkpoint_and_dispatch(
            model, checkpoint, device_map=PART_ON_DISK, offload_folder=tmp_path / "offload"
        )


def test_a_dtype_that_rounds_the_scale(accelerate, checkpoint, augment):
    model = blank(augment=augment)
    accelerate.load_checkpoint_and_dispatch(
        model, checkpoint, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    with pytest.raises(RuntimeError, match="weight_scale: expected dtype float32, got bfloat16"):
        model(X.bfloat16())


@pytest.mark.parametrize("buffers", [True, False])
def test_offload_of_a_live_model(accelerate, tmp_path, buffers, augment):
    """CHECKLIST 27."""
    expected = quantized(0, augment)
    cpu = torch.device("cpu")
    for offload in (
        lambda m: accelerate.cpu_offload(m, cpu, offload_buffers=buffers),
        lambda m: accelerate.disk_offload(m, tmp_path / "a", cpu, offload_buffers=buffers),
        lambda m: accelerate.dispatch_model(
            m, PART_ON_DISK, "cpu", offload_dir=tmp_path / "b", offload_buffers=buffers
        ),
    ):
        model = quantized(0, augment)
        offload(model)
        for _ in range(2):
            assert_same(model(X), expected(X))


# Copies, memory and dtypes.


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "walk",
    [
        copy.copy,
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        saved_and_loaded,
        lambda m: m.share_memory(),
        lambda m: m.to("cpu"),
        lambda m: m.requires_grad_(False),
        lambda m: m.zero_grad() or m,
    ],
)
def test_copies_compute_the_same(walk, augment):
    """CHECKLIST 27."""
    assert_equal(walk(quantized(0, augment)), quantized(0, augment))


@pytest.mark.parametrize("assign", [True, False])
def test_memory_first_and_values_later(assign, augment):
    model = blank("meta", augment)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    if not assign:
        model = model.to_empty(device="cpu").eval()
    model.load_state_dict(quantized(0, augment).state_dict(), assign=assign)
    assert_equal(model, quantized(0, augment))


def test_a_pickle_of_a_layer_without_the_logical_names():
    """As older versions wrote them."""
    layer = quantized()[0]
    for name in ("qweight", "qscale", "qoffset"):
        del layer._buffers[name]
    del layer._dtype
    layer = pickle.loads(pickle.dumps(layer))
    assert_same(layer(X), quantized()[0](X))
    assert layer.weight.dtype == torch.float32


def test_vectors_of_parameters():
    assert nn.utils.parameters_to_vector(quantized().parameters()).shape == (80,)


def test_traced_by_jit():
    model = quantized()
    assert_same(torch.jit.trace(model, (X,))(X), model(X))
