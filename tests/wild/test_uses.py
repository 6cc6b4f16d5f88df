"""What people do with a transformers model: as with a plain one, or refused before anything changed."""

from __future__ import annotations

import copy
import io
import os
import pickle
import signal
import time

import pytest
import torch

from qwen3_vl_memory_optimizations import create_optimized_model
from qwen3_vl_memory_optimizations.errors import (
    ConfigurationError,
    InsufficientDiskSpaceError,
    MemoryBudgetExceeded,
    TensorFreedError,
)

from ..model import tiny

IDS = torch.randint(7, 60, (2, 40), generator=torch.Generator().manual_seed(1))
CODECS = ("none", "int8", "int8_rotated", "int4")
NEEDED = 4_000_000
"""A tensor budget below the weights."""


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Make models on one directory of packed checkpoints, and close them."""
    directory, models = tmp_path_factory.mktemp("cache"), []

    def make(codec="none", **settings):
        given = {"codec": codec, "cache_dir": directory, "private": True, **settings}
        models.append(create_optimized_model(tiny.DIRECTORY, given, dtype=torch.float32))
        return models[-1]

    yield make
    for model in models:
        model.memory_optimizer.close()


def decoded(model):
    """A plain model with the weights as a codec keeps them."""
    plain = copy.deepcopy(tiny.reference())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(model.get_parameter(name))
            parameter.requires_grad_(False)
    return plain


@pytest.fixture(params=CODECS)
def pair(request, make):
    """A model with managed weights and the plain one that it stands for."""
    model = make(request.param)
    return model, decoded(model)


@pytest.fixture
def model(make):
    return make("int8")


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def close(model, plain, least=0.5):
    """Whether a model answers as the plain one, but for what kernels round (bf16 activations)."""
    found, expected = logits(model).float(), logits(plain).float()
    return float((found - expected).abs().max()) < least


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, NEEDED])
@pytest.mark.parametrize("codec", CODECS)
def test_gradients_reach_embeddings(make, codec, budget):
    model = make(codec, **({} if budget is None else {"tensor_budget": budget}))
    found = []
    for each in (model, decoded(model)):
        embeds = each.get_input_embeddings()(IDS).detach().clone().requires_grad_(True)
        each(inputs_embeds=embeds, labels=IDS).loss.backward()
        found.append(embeds.grad)
    assert float((found[0] - found[1]).abs().max()) < 0.01 * float(found[1].abs().max())


def test_gradients_reach_pixels(make):
    model, inputs, found = make(), tiny.cases()["image"], []
    for each in (model, tiny.reference()):
        pixels = inputs["pixel_values"].clone().requires_grad_(True)
        each(**{**inputs, "pixel_values": pixels}).logits.sum().backward()
        found.append(pixels.grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_a_small_parameter_can_be_trained(pair):
    gradients = []
    for each in pair:
        norm = each.model.language_model.layers[0].self_attn.q_norm.weight
        norm.requires_grad_(True)
        each(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append(norm.grad)
    torch.testing.assert_close(*gradients, rtol=0.02, atol=1e-3)


def test_a_bias_beside_a_managed_weight_can_be_trained(make):
    model, gradients = make(), []
    inputs = tiny.cases()["image"]
    for each in (model, copy.deepcopy(tiny.reference())):
        bias = each.model.visual.blocks[0].mlp.linear_fc1.bias
        bias.requires_grad_(True)
        each(**inputs).logits.sum().backward()
        gradients.append(bias.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_managed_weights_refuse_gradients_and_nothing_else_asks_for_them_then(model):
    weight = model.lm_head.weight
    for ask in (
        lambda: model.requires_grad_(True),
        lambda: weight.requires_grad_(True),
        lambda: setattr(weight, "requires_grad", True),
    ):
        with pytest.raises(ConfigurationError, match="frozen"):
            ask()
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.requires_grad_(False) is model
    weight.requires_grad = False


def test_autocast_computes_in_its_dtype(pair):
    exact = logits(pair[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, plain = logits(pair[0]), logits(pair[1])
    assert found.dtype == plain.dtype == torch.bfloat16
    assert float((found - exact).abs().max()) < 2 * float((plain - exact).abs().max())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_an_adapter_is_trained_saved_and_merged(make, tmp_path, codec):
    peft = pytest.importorskip("peft")
    model = make(codec)
    losses, answers = [], []
    for each in (model, decoded(model)):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(each, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))
        adapted.train()
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            loss = adapted(input_ids=IDS, labels=IDS).loss
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.eval()
        answers.append(logits(adapted))
        adapted.save_pretrained(tmp_path / f"adapter{len(answers)}")
        answers.append(logits(adapted.merge_and_unload()))
    assert losses[0] - losses[2] > 1
    assert losses[:3] == pytest.approx(losses[3:], abs=0.1)
    torch.testing.assert_close(answers[0], answers[2], rtol=0, atol=0.6)
    torch.testing.assert_close(answers[1], answers[3], rtol=0, atol=0.6)


def test_the_trainer_evaluates(pair, tmp_path):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 3
    found = [Trainer(model=each, args=arguments, eval_dataset=data).evaluate()["eval_loss"] for each in pair]
    assert found[0] == pytest.approx(found[1], abs=0.01)


# --- saving and loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [None, "1MB"])
def test_what_is_saved_is_what_transformers_loads(pair, tmp_path, shard):
    from transformers import Qwen3VLForConditionalGeneration

    model, plain = pair
    model.save_pretrained(tmp_path / "saved", **({} if shard is None else {"max_shard_size": shard}))
    files = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert ("model.safetensors" in files) == (shard is None)
    assert ("model.safetensors.index.json" in files) == (shard is not None)
    assert not [name for name in files if name.endswith(".partial")]
    loaded = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name


def test_a_second_save_leaves_nothing_of_the_first(model, tmp_path):
    for shard in ("1MB", "50GB", "2MB"):
        model.save_pretrained(tmp_path / "saved", max_shard_size=shard)
        create_optimized_model(tmp_path / "saved", {"codec": "none", "cache_dir": tmp_path}).memory_optimizer.close()
    assert not (tmp_path / "saved" / "model.safetensors").exists()


def test_saving_takes_no_more_than_the_budget(make, tmp_path):
    model = make("int8", tensor_budget=NEEDED)
    model.save_pretrained(tmp_path / "saved")
    accounts = model.memory_optimizer.pager.ledger.accounts()
    assert "copies of weights" not in accounts
    assert model.memory_optimizer.pager.frames.peak_bytes <= NEEDED


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(model, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(InsufficientDiskSpaceError, match="1 kB are free"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_the_optimised_class_saves_too(tmp_path):
    from qwen3_vl_memory_optimizations import OptimizedVisionLanguageModel

    model = OptimizedVisionLanguageModel.from_pretrained(
        tiny.DIRECTORY, {"codec": "int8", "cache_dir": tmp_path / "cache"}, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "saved")
    assert model.config.architectures == ["Qwen3VLForConditionalGeneration"]
    again = create_optimized_model(tmp_path / "saved", {"codec": "none", "cache_dir": tmp_path}, dtype=torch.float32)
    assert close(again, decoded(model))
    again.memory_optimizer.close()


def test_a_state_dict_is_saved_by_torch(pair):
    buffer = io.BytesIO()
    torch.save(pair[0].state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer)
    for name, values in pair[1].state_dict().items():
        assert type(loaded[name]) is torch.Tensor
        assert torch.equal(loaded[name], values)


def test_copies_of_weights_are_in_the_account_and_refused_where_they_do_not_fit(make):
    from qwen3_vl_memory_optimizations.process import rss_bytes

    model = make("int8", ram_budget=rss_bytes() + 110_000_000)
    weight, pager = model.lm_head.weight, model.memory_optimizer.pager
    kept = copy.deepcopy(weight)
    assert pager.ledger.held_bytes("copies of weights") == weight.nbytes
    assert isinstance(kept, torch.nn.Parameter) and torch.equal(kept, weight.clone())
    with pytest.raises(MemoryBudgetExceeded, match="copies of weights"):
        copies = [copy.deepcopy(weight) for _ in range(6000)]
    copies = None  # noqa: F841
    del kept
    pager.debit("copies of weights", 0, "process")
    assert pager.ledger.held_bytes("copies of weights") == 0


def test_safetensors_does_not_save_what_lies_at_an_address(model, tmp_path):
    from safetensors.torch import load_file, save_file

    state = model.state_dict()
    state.pop("lm_head.weight")
    with pytest.raises(ValueError, match="contiguous"):
        save_file(state, tmp_path / "state.safetensors")
    save_file({name: each.contiguous() for name, each in state.items()}, tmp_path / "state.safetensors")
    saved = load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(saved[name], each + 0) for name, each in state.items())


def test_a_state_dict_is_loaded_by_copying(pair):
    model, plain = pair
    state = {name: values * 2 for name, values in plain.state_dict().items()}
    model.load_state_dict(state)
    for name, parameter in model.named_parameters():
        assert float((parameter - state[name]).norm()) <= 0.1 * float(state[name].norm()), name
    assert close(model, decoded(model))


def test_a_state_dict_cannot_take_the_place_of_weights(model):
    before = logits(model)
    with pytest.raises(ConfigurationError, match="assign"):
        model.load_state_dict(tiny.reference().state_dict(), assign=True)
    assert torch.equal(logits(model), before)


# --- copies and conversions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [copy.deepcopy, copy.copy, pickle.dumps, lambda model: torch.save(model, io.BytesIO())],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_a_model_is_not_copied(model, use):
    with pytest.raises(ConfigurationError, match="neither copied nor pickled"):
        use(model)


def test_a_part_is_copied_as_a_plain_one(pair):
    layer = copy.deepcopy(pair[0].model.language_model.layers[0])
    expected = pair[1].model.language_model.layers[0]
    assert type(layer.mlp.up_proj.weight) is torch.nn.Parameter
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_is_converted_whole(pair, dtype):
    model, plain = pair
    before = logits(model)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert model.to(dtype) is model
    assert {each.dtype for each in model.parameters()} == {dtype}
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert close(model, plain.to(dtype), least=1)
    assert logits(model).dtype == dtype
    found = model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    assert found.shape == (2, IDS.shape[1] + 3)
    model.float()
    assert float((logits(model) - before).abs().max()) < 0.5


def test_a_part_is_converted(model):
    model.model.visual.double()
    assert {each.dtype for each in model.model.visual.parameters()} == {torch.float64}
    assert model.lm_head.weight.dtype == torch.float32


def test_a_conversion_is_in_the_account(make):
    model = make("int8", tensor_budget=NEEDED)
    ledger = model.memory_optimizer.pager.ledger
    before = ledger.held_bytes("small weights")
    small = sum(each.nbytes for each in model.parameters() if type(each) is torch.nn.Parameter)
    model.double()
    assert ledger.held_bytes("small weights") == before + small


def test_another_device_is_refused_and_nothing_is_moved(model):
    with pytest.raises(ConfigurationError, match="'meta'"):
        model.to("meta")
    assert not any(each.is_meta for each in model.parameters())


def test_accelerate_offloads_nothing(model, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    before = logits(model)
    for offload in (accelerate.cpu_offload, lambda model: accelerate.disk_offload(model, tmp_path / "offload")):
        with pytest.raises(ConfigurationError, match="ram_budget"):
            offload(model)
        assert torch.equal(logits(model), before)


def test_the_vocabulary_keeps_its_size(model):
    now = model.get_input_embeddings().weight.shape[0]
    for size in (now + 8, now - 8):
        with pytest.raises(ConfigurationError, match=f"{now} tokens and cannot be resized to {size}"):
            model.resize_token_embeddings(size)
    assert model.resize_token_embeddings(now).weight is model.get_input_embeddings().weight
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.config.get_text_config().vocab_size == now


def test_weights_are_tied_again(pair):
    pair[0].tie_weights()
    assert pair[0].lm_head.weight is pair[0].get_input_embeddings().weight
    assert close(*pair)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    "use", [logits, lambda model: model.generate(IDS, max_new_tokens=2), lambda model: model.lm_head.weight + 0]
)
def test_a_forked_process_is_told_and_does_not_hang(model, use):
    expected = logits(model)
    child = os.fork()
    if not child:
        code = 1
        try:
            use(model)
        except TensorFreedError:
            code = 42
        finally:
            os._exit(code)
    end = time.monotonic() + 20
    status = None
    while status is None and time.monotonic() < end:
        pid, found = os.waitpid(child, os.WNOHANG)
        status = found if pid else time.sleep(0.02)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert status is not None and os.waitstatus_to_exitcode(status) == 42
    assert torch.equal(logits(model), expected)
