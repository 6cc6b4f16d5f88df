import copy
import gc
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qwen3_vl_memory_optimizations import ManagedTensor, MemoryBudgetExceeded
from qwen3_vl_memory_optimizations.compression import INT8Codec
from qwen3_vl_memory_optimizations.paging import TensorEntry
from qwen3_vl_memory_optimizations.pools import FRAME_BYTES, reserve
from tests.paging.weights import COLUMNS, FRAMES_BYTES, ROWS, random_weights, register, settle

MIB = 2**20


def force_out(optimizer):
    """Swap out everything that is not pinned, by taking its place for a moment."""
    pager = optimizer.pager
    with pager._lock:
        pages = [page for entry in pager.entries.values() for page in entry.pages]
        for page in pages:
            pager._mover.evict(page)
    settle(pager)


@pytest.fixture
def optimizer(make_optimizer):
    return make_optimizer(16 * MIB)


def counted(optimizer, shape=(8, 16), dtype=torch.float32):
    tensor = optimizer.allocate_tensor(shape, dtype)
    tensor.copy_(torch.arange(tensor.numel()).view(shape))
    return tensor, torch.arange(tensor.numel()).view(shape).to(dtype)


IN_PLACE = {
    "add_": lambda t: t.add_(1),
    "operator": lambda t: t.__iadd__(1),
    "setitem": lambda t: t.__setitem__((slice(None), 3), 7.0),
    "copy_": lambda t: t.copy_(torch.full((8, 16), 5.0)),
    "out": lambda t: torch.add(torch.ones(8, 16), 2, out=t),
    "zero_": lambda t: t.zero_(),
    "masked_fill_": lambda t: t.masked_fill_(torch.ones(8, 16) > 0, 2.5),
    "overload": lambda t: torch.ops.aten.mul_.Scalar(t, 3),
    "below the interface": lambda t: below_the_interface(t),
    "functional": lambda t: F.relu(t.neg_(), inplace=True),
    "a view": lambda t: t[2].fill_(11),
    "a view of a view": lambda t: t.view(4, 32)[1, :5].mul_(2),
    "a part": lambda t: t.narrow(0, 1, 2).zero_(),
    "numpy": lambda t: t.numpy().fill(4),
    "migrated": None,
}


def below_the_interface(tensor):
    with torch._C.DisableTorchFunctionSubclass():
        tensor.add_(1)


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("clean", [False, True])
def test_whatever_writes_in_place_survives_an_eviction(optimizer, name, clean):
    tensor, plain = counted(optimizer)
    if clean:  # a copy of the old contents lies in the swap file already
        force_out(optimizer)
        assert tensor.tier == "ssd"
        assert torch.equal(tensor.clone(), plain)
    write = IN_PLACE[name] or (lambda t: (optimizer.migrate_for_compute(t) if t is tensor else t).fill_(6))
    write(plain)
    write(tensor)
    assert not torch.equal(plain, torch.arange(128.0).view(8, 16))
    force_out(optimizer)
    assert tensor.tier == "ssd"
    assert torch.equal(tensor.clone(), plain)
    assert type(tensor) is ManagedTensor


def test_a_view_stays_valid_while_others_press_for_its_memory(make_optimizer):
    optimizer = make_optimizer(3 * MIB)
    tensor = optimizer.allocate_tensor((MIB,), torch.uint8).fill_(7)
    view = tensor.view(2, -1)[1]
    for _ in range(4):
        pressing = [optimizer.allocate_tensor((MIB,), torch.uint8).fill_(1) for _ in range(3)]
        del pressing
    assert tensor.tier == "cpu" and view.unique().tolist() == [7]
    with pytest.raises(MemoryBudgetExceeded):
        optimizer.allocate_tensor((3 * MIB,), torch.uint8)
    assert view.unique().tolist() == [7]
    del view
    others = optimizer.allocate_tensor((3 * MIB,), torch.uint8)
    assert (tensor.tier, others.tier) == ("ssd", "cpu")
    assert tensor.unique().tolist() == [7]


@pytest.mark.parametrize(
    "take",
    [lambda t: t.view(-1), lambda t: t.numpy(), lambda t: memoryview(t.numpy()), lambda t: t.T, lambda t: list(t)[3]],
    ids=["view", "numpy", "memoryview", "transposed", "row"],
)
def test_a_view_outlives_its_tensor_and_the_memory_goes_with_the_view(optimizer, take):
    tensor, plain = counted(optimizer)
    view = take(tensor)
    expected = np.asarray(take(plain)).copy()
    del tensor
    gc.collect()
    other, _ = counted(optimizer)  # would take the address if it were free
    other.zero_()
    assert np.array_equal(np.asarray(view), expected)
    del view, other
    gc.collect()
    assert optimizer.pager.frames.used_bytes == 0
    assert optimizer.pool.stats()["general"]["used_bytes"] == 0


def test_tensors_in_cycles_are_freed_by_the_garbage_collector_at_any_moment(make_optimizer):
    optimizer = make_optimizer(24 * MIB)
    thresholds = gc.get_threshold()
    gc.set_threshold(3)
    try:
        for step in range(60):
            loop = [optimizer.allocate_tensor((MIB // 2,), torch.uint8).fill_(step)]
            loop += [loop] + [loop[0][5:]] * (step % 2)
            assert loop[0].unique().tolist() == [step]
            del loop
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    settle(optimizer.pager)
    assert optimizer.pager.frames.used_bytes == 0 and optimizer.pager.swap_used_bytes == 0


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0), (1,), (3, 5, 7), 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_every_shape_and_dtype(optimizer, shape, dtype):
    tensor = optimizer.allocate_tensor(shape, dtype)
    plain = torch.zeros(shape, dtype=dtype)
    assert (tensor.shape, tensor.dtype, tensor.numel()) == (plain.shape, dtype, plain.numel())
    assert torch.equal(tensor.clone(), plain)
    force_out(optimizer)
    assert torch.equal(tensor + tensor, plain + plain)


def test_operations_agree_with_plain_tensors(optimizer):
    tensor, plain = counted(optimizer)
    other, other_plain = counted(optimizer)
    for operation in (
        lambda a, b: a + b,
        lambda a, b: 2 - a,
        lambda a, b: a @ b.T,
        lambda a, b: torch.cat([a, b]),
        lambda a, b: torch.stack((a, b)).sum(),
        lambda a, b: a.topk(3).values,
        lambda a, b: torch.where(a > 5, a, -b),
        lambda a, b: a[1:3, ::2].contiguous(),
        lambda a, b: F.linear(a, b),
        lambda a, b: F.linear(a, torch.ones(4, 16)),
        lambda a, b: F.embedding(torch.tensor([1, 1, 7]), a),
        lambda a, b: F.softmax(a, dim=-1),
        lambda a, b: a.to(torch.float64),
    ):
        found, exact = operation(tensor, other), operation(plain, other_plain)
        assert type(found) is torch.Tensor and torch.equal(found, exact)
    assert torch.equal(tensor, plain) and float(tensor.max()) == 127 and tensor.tolist() == plain.tolist()
    assert len(tensor) == 8 and tensor.is_contiguous() and tensor.device == plain.device


def test_copies_and_pickles_are_plain(optimizer):
    tensor, plain = counted(optimizer)
    for copied in (copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor)), tensor.clone()):
        assert type(copied) is torch.Tensor and torch.equal(copied, plain)


def test_questions_do_not_load_it(optimizer):
    tensor, _ = counted(optimizer)
    force_out(optimizer)
    assert (tensor.shape, tensor.dtype, tensor.device.type, tensor.dim()) == ((8, 16), torch.float32, "cpu", 2)
    assert tensor.detach() is tensor and tensor.data is tensor and not tensor.requires_grad
    assert "ssd" in repr(tensor) and "general-0" in repr(tensor) and tensor.nbytes == 512
    assert (tensor.tensor_id, tensor.kind, tensor.codec, tensor.tier) == ("general-0", "general", "none", "ssd")


def test_an_error_in_an_operation_leaves_nothing_pinned(optimizer):
    tensor, plain = counted(optimizer)
    with pytest.raises(RuntimeError):
        tensor @ tensor
    gc.collect()
    force_out(optimizer)
    assert tensor.tier == "ssd" and torch.equal(tensor.clone(), plain)


def test_clean_weights_with_views_are_dropped_and_written_ones_kept(make_optimizer, tmp_path):
    optimizer = make_optimizer(8 * FRAMES_BYTES)
    weights = random_weights(2)
    managed = register(optimizer.pager, weights, tmp_path / "w.safetensors")
    managed["w0"][3].sum()
    managed["w1"][3].fill_(2)
    weights["w1"][3].fill_(2)
    force_out(optimizer)
    assert (optimizer.pager.stats.evictions, optimizer.pager.stats.swap_writes) == (1, 1)
    for name, weight in managed.items():
        assert torch.equal(weight.clone(), weights[name]), name


def test_encoded_weights_compute_encoded_and_take_writes(make_optimizer):
    optimizer, codec = make_optimizer(MIB), INT8Codec()
    values = torch.randn(ROWS, COLUMNS)
    first, *rest = codec.segments(values.shape, values.dtype)
    encoded = codec.encode(values)
    entry = TensorEntry(
        "w",
        "weights",
        (ROWS, COLUMNS),
        torch.float32,
        codec,
        reserve(first.n_bytes + FRAME_BYTES),
        first.dtype,
        (ROWS, COLUMNS),
        {segment.name: encoded[segment.name] for segment in rest},
        rows_per_page=16,
        page_bytes=16 * COLUMNS,
    )
    optimizer.pager.add(entry, resident=True)
    entry.encoded(0, ROWS)["data"].copy_(encoded["data"])
    weight = ManagedTensor(optimizer.pager, entry)
    decoded = codec.decode(encoded, torch.empty(ROWS, COLUMNS))
    assert torch.equal(weight.clone(), decoded)
    x = torch.randn(3, COLUMNS)
    torch.testing.assert_close(F.linear(x, weight), F.linear(x, decoded), rtol=0.05, atol=0.5)
    assert torch.equal(F.embedding(torch.tensor([5, 60]), weight), decoded[[5, 60]])
    weight.mul_(2)
    force_out(optimizer)
    torch.testing.assert_close(weight.clone(), decoded * 2, rtol=0, atol=0.05)


@pytest.mark.parametrize("n_rows", [1, 2, 5, 8, 33])
def test_weights_in_several_pages_give_the_bits_of_one(make_optimizer, tmp_path, n_rows):
    """In fp32 MKL's results depend on the width of the matrix: cut at pages, most of these would differ on Intel."""
    torch.manual_seed(0)
    weights = {f"w{number}": torch.randn(1024, 384) for number in range(8)}
    optimizer = make_optimizer(5 * 1024 * 384 * 4)
    managed = register(optimizer.pager, weights, tmp_path / "w.safetensors", rows_per_page=128)
    x = torch.randn(n_rows, 384)
    for _ in range(2):
        for name, weight in managed.items():
            assert len(weight.entry.pages) == 8
            assert torch.equal(F.linear(x, weight), F.linear(x, weights[name])), name
    assert not any(page.pins for weight in managed.values() for page in weight.entry.pages)
