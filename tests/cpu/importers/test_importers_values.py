"""Values that scales and zeros may have: either sign, any zero of 8 bits, one for all, none."""

import itertools

import pytest
import torch
from foreign import K, N, write
from foreign_settings import BASES, assert_refused, codes, ct, result, s128, scales, weight

from liquidgemm import LiquidLinear, import_checkpoint, unpack_int8_weight
from liquidgemm.formats import int8


@pytest.mark.parametrize(("base", "sign"), itertools.product(BASES, [1, -1]))
def test_scales_of_either_sign(tmp_path, base, sign):
    """A negative scale turns the weight around, in each format the same."""
    tensors, settings = BASES[base]
    state = {key: tensor.clone() for key, tensor in tensors.items()}
    expected = weight(result(tmp_path, state, settings))
    for key in state:
        if "scale" in key or key == "s_channel":
            state[key][..., 1::2] *= sign
            if base.startswith("ct"):
                state[key] = tensors[key].clone()
                state[key][1::2] *= sign
        if key == "s1_szeros":  # the product of a scale and a zero
            state[key][1::2] *= sign
    got = weight(result(tmp_path, state, settings))
    rows = (got * expected).sum(1).sign()
    assert (rows == -1).any() == (sign == -1)
    assert torch.equal(rows.unsqueeze(1) * got, expected) or "groups" in base
    assert (rows.unsqueeze(1) * got - expected).norm() < 0.06 * expected.norm()


def test_one_scale_for_the_whole_weight(tmp_path):
    tensors, _ = BASES["ct int"]
    for one in (torch.tensor([0.01]), torch.tensor(0.01), torch.tensor([[0.01]])):
        state = result(
            tmp_path, {**tensors, "weight_scale": one}, ct("int-quantized", strategy="tensor")
        )
        assert torch.equal(weight(state), (codes.double() - 8) * one.double())


def test_scales_are_checked_by_the_name_of_their_tensor(tmp_path):
    for tensors, settings in BASES.values():
        for key in (key for key in tensors if "scale" in key or key == "s_channel"):
            for value in (torch.nan, torch.inf, 0.0):
                bad = tensors[key].clone().fill_(value)
                source = write(tmp_path / "source", {"a": {**tensors, key: bad}}, settings)
                with pytest.raises(ValueError, match=rf"a: {key}: expected (finite|scales)"):
                    import_checkpoint(source, tmp_path / "out", progress=False)


def eight_bits(k, zero, low=-128, high=127, **weights):
    """Every row has both ends of the range."""
    values = torch.randint(low, high + 1, (N, k), generator=torch.Generator().manual_seed(0))
    values[:, 0], values[:, 1] = low, high
    tensors = {
        "weight": values.to(torch.int8),
        "weight_scale": scales,
        "weight_zero_point": torch.full((N, 1), zero, dtype=torch.int8),
    }
    settings = ct("int-quantized", num_bits=8, symmetric=False, **weights)
    return tensors, settings, scales.double() * (values - zero)


@pytest.mark.parametrize("zero", [-127, -113, -112, -17, -1, 0, 1, 100, 127])
def test_eight_bits_with_zeros_of_any_size(tmp_path, zero):
    tensors, settings, meant = eight_bits(K, zero)
    assert torch.equal(weight(result(tmp_path, tensors, settings)), meant)


def test_w8a8_becomes_int8_weights(tmp_path):
    """Every value as it is in the source, 8 bits each: no column is multiplied twice."""
    tensors, settings, meant = eight_bits(K, 0)
    state = result(tmp_path, tensors, settings)
    layer = LiquidLinear(K, N, bias=False, augment=K)
    layer.load_state_dict({name: state[f"a.{name}"] for name in layer.state_dict()})
    assert layer.packed.shape == (-(-N // 64), K // 64, int8.BLOCK_BYTES)
    w8 = unpack_int8_weight(layer.packed, N)
    assert torch.equal(w8, tensors["weight"])
    assert torch.equal(w8.double() * layer.scale.double()[:, None], meant)
    # Zeros that leave values beyond INT8 keep columns of their own.
    tensors, settings, meant = eight_bits(K, 100)
    state = result(tmp_path, tensors, settings)
    layer.load_state_dict({name: state[f"a.{name}"] for name in layer.state_dict()})
    assert layer.packed.shape[1] == 2 * K // 64
    assert torch.equal(weight(state), meant)


def test_eight_bits_of_columns_that_fill_no_group(tmp_path):
    """Where the values fit INT8; else what fills the last group could not be zero."""
    for zero, low, high in ((0, -128, 127), (-10, -128, 117), (10, -118, 127)):
        tensors, settings, meant = eight_bits(100, zero, low, high)
        assert torch.equal(weight(result(tmp_path, tensors, settings), 100), meant)
    tensors, settings, _ = eight_bits(100, 10)
    assert_refused(tmp_path, tensors, settings, "zero points: .* no multiple of 64 columns")


def test_eight_bits_that_do_not_fit_are_refused(tmp_path):
    tensors, settings, _ = eight_bits(K, -128)
    assert_refused(tmp_path, tensors, settings, "a: zero points: expected .* got 0 to 255")
    tensors, settings, _ = eight_bits(K, 0, strategy="group", group_size=128)
    tensors["weight_scale"] = s128
    tensors["weight_zero_point"] = tensors["weight_zero_point"].expand(N, 2).contiguous()
    assert_refused(tmp_path, tensors, settings, "num_bits: expected 4 for weights in groups, got 8")
