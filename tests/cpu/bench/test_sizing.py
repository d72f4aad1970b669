"""The model of speeds and memory: what was measured comes back, the rest follows from it."""

import json

import pytest

from bench.decoder.sizes import MODELS
from bench.report import serve, sizing
from bench.report.sizing import SIZED, Gpu, Model, Step, kv_room, nearest, step_of, traffic

BASE = SIZED["llama3-8b"]
GPU = Gpu()


def row_of(overhead=1e-4, work=1e-5, form="w4a8", model="llama3-8b", batches=(1, 16, 64)) -> dict:
    """As if the model of the time were true: overhead of a layer, work of each token but one."""
    sizes, steps = MODELS[model], []
    for batch in batches:
        seconds = traffic(Model(sizes), form, "auto", batch, 512, GPU)
        seconds += sizes.layers * overhead + (batch - 1) * work
        steps.append({"batch": batch, "prefill_s": 1.0, "step_ms": seconds * 1e3})
    row = {"model": model, "layers": sizes.layers, "format": form, "kv": "auto", "status": "ok"}
    return row | {"tokens_in": 512, "steps": steps}


def test_what_was_measured_is_given_as_it_is():
    row = row_of()
    for step in row["steps"]:
        expected = Step(step["step_ms"] / 1e3, True)
        assert step_of(row, BASE, step["batch"], 512, GPU) == expected


def test_other_batches_and_contexts_follow_the_model():
    row = row_of()
    for batch, context in ((1, 4096), (16, 2048), (40, 512)):
        expected = traffic(BASE, "w4a8", "auto", batch, context, GPU) + 32e-4 + (batch - 1) * 1e-5
        found = step_of(row, BASE, batch, context, GPU)
        assert found.seconds == pytest.approx(expected)
        assert not found.measured


def test_another_model_has_the_overhead_of_its_layers_and_the_work_of_its_weights():
    other = SIZED["llama2-70b"]
    ratio = other.weights / BASE.weights
    expected = traffic(other, "w4a8", "auto", 16, 512, GPU) + 80e-4 + 15e-5 * ratio
    assert step_of(row_of(), other, 16, 512, GPU).seconds == pytest.approx(expected)


def test_several_gpus_share_traffic_and_work_but_not_overhead():
    free = Gpu(latency=0, link=float("inf"))
    expected = traffic(BASE, "w4a8", "auto", 16, 512, free) / 4 + 32e-4 + 15e-5 / 4
    assert step_of(row_of(), BASE, 16, 512, free, 4).seconds == pytest.approx(expected)
    slow = step_of(row_of(), BASE, 16, 512, GPU, 4).seconds
    assert slow == pytest.approx(expected + 64 * GPU.all_reduce(2 * 16 * 4096, 4))


def test_beyond_what_was_measured_nothing_is_said():
    with pytest.raises(ValueError, match="batch: expected 1 to 64, as measured, got 65"):
        step_of(row_of(), BASE, 65, 512, GPU)


def test_experts_are_read_as_tokens_need_them():
    model = SIZED["mixtral-8x7b"]
    assert model.weights == pytest.approx(46.4e9, rel=0.01)  # of 46.7, with embeddings and head
    assert model.active_weights == pytest.approx(12.6e9, rel=0.01)
    assert model.read_weights(1) == pytest.approx(model.active_weights)
    assert model.read_weights(256) == pytest.approx(model.weights)


def test_room_for_keys_and_values():
    """70B has room on one GPU in four bits, and not in eight."""
    big = SIZED["llama2-70b"]
    assert kv_room(big, "fp8", "auto", GPU) < 1000 < kv_room(big, "w4a8", "auto", GPU)
    small = kv_room(BASE, "w4a8", "auto", GPU)
    held = small * 2 * MODELS["llama3-8b"].kv_values + BASE.weights * 34 / 64
    held += 4 * 128256 * 4096 + GPU.reserve
    assert held == pytest.approx(0.88 * 80e9, rel=1e-4)
    assert kv_room(BASE, "w4a8", "fp8", GPU) == pytest.approx(2 * small, abs=2)
    # Eight heads of keys on sixteen GPUs are there twice.
    assert kv_room(BASE, "w4a8", "auto", GPU, 16) < 9 * kv_room(BASE, "w4a8", "auto", GPU)


def test_the_nearest_row_is_of_the_format():
    rows = [row_of(), row_of(model="llama2-70b"), row_of(form="fp8")]
    assert nearest(rows, SIZED["llama2-70b"], "w4a8") is rows[1]
    assert nearest(rows, SIZED["mixtral-8x7b"], "w4a8") is rows[0]
    assert nearest(rows, SIZED["llama2-70b"], "fp8") is rows[2]
    assert nearest(rows, BASE, "bf16") is None


def test_table_says_what_is_measured(tmp_path, capsys):
    file = tmp_path / "serve.json"
    file.write_text(json.dumps({"schema": serve.SCHEMA, "rows": [row_of()]}))
    assert sizing.main([str(file), "--price", "3.6", "--batch", "16", "--gpus", "1,2"]) == 0
    table = capsys.readouterr().out.splitlines()[2:]
    kinds = [line.split("|")[-2].strip() for line in table]
    assert kinds[:2] == ["measured", "modelled"]
    assert kinds[-1] == "modelled; no step of it was measured"
    cells = [cell.strip() for cell in table[0].split("|")]
    assert float(cells[7]) == pytest.approx(float(cells[6]) * 1000, rel=0.01)


def test_other_files_and_words_are_refused(tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text('{"schema": 99}')
    for words in ([str(file), "--price", "1"], [str(tmp_path / "none"), "--price", "1"],
                  [str(file), "--price", "0"]):  # fmt: skip
        with pytest.raises(SystemExit):
            sizing.main(words)
    assert "--price: expected more than 0" in capsys.readouterr().err
