"""What may go wrong around the ops on a CPU: threads, forks, memory, odd pointers and strides, NaN and infinity."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import beit3_fast
from beit3_fast.backend import use_backend
from beit3_fast.layout import TokenLayout
from beit3_fast.ops import attention, decode_attention, layer_norm, multiway_ffn, multiway_linear
from ops.parity import LOW_PRECISION

LIBRARY = beit3_fast._extension.status()["cpu"]
pytestmark = pytest.mark.skipif(not LIBRARY.loaded, reason=f"the CPU library is not loaded: {LIBRARY.reason}")
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="there is no /proc of Linux")

Values = dict[str, Tensor]
Form = Callable[[Tensor], Tensor]
OPS = ("layer_norm", "multiway_linear", "multiway_ffn", "attention", "decode_attention")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, undone behind the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Call:
    """An op with its inputs, of `rows` rows for each of two experts or samples."""

    def __init__(self, op: str, rows: int, width: int = 64, dtype: torch.dtype = torch.float32) -> None:
        self.op, self.width = op, width
        self.layout = TokenLayout.from_lengths([rows - rows // 3, rows], [rows // 3, 0])
        self.offsets = self.layout.expert_offsets
        shapes: dict[str, tuple[int, ...]] = {
            "layer_norm": {"x": (2 * rows, width), "weight": (2, width), "bias": (2, width)},
            "multiway_linear": {"x": (2 * rows, width), "weight": (2, 3 * width, width), "bias": (2, 3 * width)},
            "multiway_ffn": {
                "x": (2 * rows, width),
                "fc1_weight": (2, 3 * width, width),
                "fc1_bias": (2, 3 * width),
                "norm_weight": (2, 3 * width),
                "norm_bias": (2, 3 * width),
                "fc2_weight": (2, width, 3 * width),
                "fc2_bias": (2, width),
            },
            "attention": {"qkv": (2 * rows, 3, 4, width // 4)},
            "decode_attention": {
                "qkv": (2 * 3 * 2, 3, 4, width // 4),
                "prefix": (2 * rows, 2, 4, width // 4),
                "words": (5, 2 * 3, 2, 4, width // 4),
            },
        }[op]
        self.values: Values = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
        self.history = torch.arange(6, dtype=torch.int32).expand(5, 6)

    def forward(self, values: Values) -> tuple[Tensor, ...]:
        if self.op == "attention":
            return (attention(values["qkv"], self.layout, 4, mask="captioning"),)
        if self.op == "decode_attention":
            return (decode_attention(**values, layout=self.layout, history=self.history, length=4),)
        function = {"layer_norm": layer_norm, "multiway_linear": multiway_linear, "multiway_ffn": multiway_ffn}[self.op]
        options = {"activation": "gelu"} if self.op == "multiway_linear" else {"residual": values["x"]}
        result = function(**values, expert_offsets=self.offsets, **options)
        return result if isinstance(result, tuple) else (result,)

    def __call__(self, form: Form | None = None) -> list[Tensor]:
        """Outputs and gradients of every input; tensors, cotangents too, lie in memory as `form` lays them."""
        leaves = {name: value if form is None else form(value) for name, value in self.values.items()}
        if self.op == "decode_attention":
            return list(self.forward(leaves))
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        outputs = self.forward(leaves)
        cotangents = [output.detach() if form is None else form(output.detach()) for output in outputs]
        return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, list(leaves.values()), cotangents)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


# --- threads and processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_number_of_threads_changes_no_bit(op: str, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    call = Call(op, 220, 128, dtype)
    threads(1)
    expected = call()
    for count in (2, 3):
        threads(count)
        assert_same(call(), expected)


def test_calls_at_the_same_time(threads: Callable[[int], None]) -> None:
    """From four Python threads, each of which uses two of PyTorch's."""
    calls = [Call(op, 90, 128) for op in OPS]
    threads(2)
    expected = [call() for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for i, results in enumerate(pool.map(lambda i: calls[i % len(calls)](), range(60))):
            assert_same(results, expected[i % len(calls)])


class Worked(Dataset[list[Tensor]]):
    """Item i is what the i-th op gives where it is asked for."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.calls[index]()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_workers() -> None:
    """Of a DataLoader, after the parent has used its threads. The parent is a new process: autograd refuses to run in
    forks of one that has had a GPU, be it a pretended one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(fork_workers).result()


def fork_workers() -> None:
    warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
    torch.manual_seed(0)
    dataset = Worked([Call(op, 220, 128) for op in OPS])
    torch.set_num_threads(2)
    expected = list(dataset)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    for results, wanted in zip(loader, expected, strict=True):
        assert_same(results, wanted)


def seconds_of_threads() -> dict[int, float]:
    """CPU time of every thread of this process."""
    seconds = {}
    for task in Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        seconds[int(task.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


@needs_proc
@pytest.mark.parametrize("count", [1, 2])
def test_one_thread_is_one_thread(count: int, threads: Callable[[int], None]) -> None:
    """And where two are asked for they work: else nothing would be seen here."""
    calls = [Call(op, 300, 128) for op in OPS if op != "decode_attention"]
    threads(count)
    for call in calls:
        call()  # a pool of threads waits for more work for a moment
    time.sleep(0.3)
    before = seconds_of_threads()
    stop = time.perf_counter() + 0.7
    while time.perf_counter() < stop:
        for call in calls:
            call()
    own = threading.get_native_id()
    spent = {thread: after - before.get(thread, 0.0) for thread, after in seconds_of_threads().items()}
    others = sum(seconds for thread, seconds in spent.items() if thread != own)
    assert spent[own] > 0.05
    assert (others > 0.1 * spent[own]) == (count > 1)


# --- memory -----------------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@needs_proc
@pytest.mark.parametrize("op", OPS)
def test_a_thousand_calls_leave_no_memory_behind(op: str) -> None:
    """A call's tensors and scratch memory have 1.3 KiB at least: a thousand of any of them would be seen."""
    call = Call(op, 16)
    for _ in range(300):
        call()
    gc.collect()
    before = resident_bytes()
    for _ in range(1000):
        call()
    gc.collect()
    grown = resident_bytes() - before
    assert grown < 2**20, f"{grown / 2**20:.1f} MiB more"


def misaligned(offset: int) -> Form:
    """`offset` bytes behind an aligned address."""

    def form(tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        buffer = bytearray(size + 64)
        start = -torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() % 64 + offset
        view = torch.frombuffer(buffer, dtype=tensor.dtype, count=tensor.numel(), offset=start % 64)
        return view.view(tensor.shape).copy_(tensor)

    return form


@pytest.mark.parametrize("offset", [1, 2, 6, 33])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_misaligned_memory(op: str, dtype: torch.dtype, offset: int) -> None:
    call = Call(op, 70, 88, dtype)
    assert misaligned(offset)(torch.ones(3)).data_ptr() % 64 == offset
    assert_same(call(misaligned(offset)), call())


def columns_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def between_others(tensor: Tensor) -> Tensor:
    """Rows and columns apart, NaN between them."""
    wide = torch.full([2 * size for size in tensor.shape], float("nan"), dtype=tensor.dtype)
    return wide[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)


@pytest.mark.parametrize("form", [columns_first, between_others], ids=["columns first", "between others"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_strides(op: str, dtype: torch.dtype, form: Form) -> None:
    call = Call(op, 51, 40, dtype)
    assert_same(call(form), call())


@pytest.mark.parametrize("op", OPS)
def test_expanded(op: str) -> None:
    """One row, head or expert in the memory of all, and the cotangent of a sum: one element."""
    call = Call(op, 51, 40)
    call.values = {name: value[:1].expand(value.shape) for name, value in call.values.items()}
    assert_same(call(), call(Tensor.contiguous))
    if op != "decode_attention":
        leaves = {name: value.detach().requires_grad_() for name, value in call.values.items()}
        inputs, outputs = list(leaves.values()), call.forward(leaves)
        one = torch.ones(())
        expanded = torch.autograd.grad(outputs, inputs, [one.expand(o.shape) for o in outputs], retain_graph=True)
        assert_same(list(expanded), list(torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])))


# --- NaN and infinity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("op", ["layer_norm", "multiway_linear", "multiway_ffn"])
def test_specials_reach_what_they_reach_in_pytorch(op: str, dtype: torch.dtype, special: float) -> None:
    """Outputs and gradients; of two infinities one formula makes NaN and another infinity."""
    for name in Call(op, 2).values:
        call = Call(op, 53, 40, dtype)
        call.values[name].flatten()[-3] = special  # of the second expert, not in a whole vector
        ours = call()
        with use_backend("reference"):
            plain = call()
        assert any(not tensor.isfinite().all() for tensor in plain)
        for actual, expected in zip(ours, plain, strict=True):
            assert torch.equal(actual.isfinite(), expected.isfinite())
            if special != special:
                assert torch.equal(actual.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_gelu_of_specials(dtype: torch.dtype) -> None:
    """At infinity PyTorch gives NaN or infinity, as the dtype has it."""
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e4, -1e4, 0.0, -0.0, 6e-8], dtype=dtype)
    x = x.repeat(5).unsqueeze(1).requires_grad_()
    identity, nothing = torch.ones(1, 1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    offsets = torch.tensor([0, len(x)], dtype=torch.int32)
    actual = multiway_linear(x, identity, nothing, offsets, activation="gelu")
    expected = F.gelu(x)
    for ours, plain in ((actual, expected), *zip(gradient(actual, x), gradient(expected, x), strict=True)):
        assert torch.equal(ours.isfinite(), plain.isfinite())
        assert ours[::8].isnan().all()


def gradient(y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, x, torch.ones_like(y))


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_a_nan_in_keys_that_nobody_may_see(dtype: torch.dtype) -> None:
    """No output and no gradient but that of the queries, 0 * NaN, knows of it: as in PyTorch."""
    layout = TokenLayout.from_lengths([20], [33])
    hidden = torch.rand(53, 53) < 0.3
    hidden[:, 45] = True
    qkv = torch.randn(53, 3, 2, 24).to(dtype)
    qkv[45, 1] = float("nan")
    results = []
    for backend in ("auto", "reference"):
        with use_backend(backend):
            leaf = qkv.clone().requires_grad_()
            out = attention(leaf, layout, 2, mask=hidden)
            results.append((out.detach(), *gradient(out, leaf)))
    (out, dqkv), (plain_out, plain_dqkv) = results
    assert out.isfinite().all()
    assert plain_out.isfinite().all()
    assert dqkv[:, 1:].isfinite().all()
    assert torch.equal(dqkv.isnan(), plain_dqkv.isnan())
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, plain_out, rtol=tolerance, atol=4 * tolerance)
