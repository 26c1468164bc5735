"""Which config a Triton GEMM runs with on this GPU: measured once by ``beit3-fast tune``, looked up at every call.

Winners are kept in ``$XDG_CACHE_HOME/beit3_fast/tuned.json`` (``~/.cache`` without the variable) per device name, op,
widths, number of experts, row bucket and dtype. Row counts come in buckets, and a bucket that was not tuned takes the
configs of the nearest that was (:data:`REACH`): a new batch size finds its entry, and nothing is ever timed inside a
step. What has no such entry runs with the kernels' default configs, which are chosen once for every bucket too.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import itertools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._candidates import Product, promising
from .kernels.config import Config

SCHEMA = 1
"""Of the file; raised when a field changes its meaning or goes away."""

ROLES = {
    "multiway_linear": ("forward",),
    "multiway_linear_backward": ("dx", "dweight"),
    "multiway_ffn": ("fc1", "fc2"),
    "multiway_ffn_backward": ("dhidden", "dx", "dfc1", "dfc2"),
}
"""The launches of each op that a config is chosen for, in the order they are tuned."""

SIZES = ((768, 3072), (1024, 4096))
"""(width, hidden width) that are tuned by default: BEiT-3 base and large."""

ROWS = (256, 2048, 8192, 32768)
"""Row buckets that are tuned by default: 1, 8, 32 and 128 images of 224 pixels with a text each."""

REACH = 3
"""How many times more or fewer rows a tuned bucket may have than what it is used for. Steps of eight, the largest in
:data:`ROWS`, leave nothing between them: 3 * 3 > 8."""

Timer = Callable[[Callable[[], object]], float]
"""Times what ``bench.timing.prepared`` gives, a few times; returns the median milliseconds of a call."""

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_MEASURED = ("triton_ms", "default_ms", "pytorch_ms", "error", "pytorch_error")


@dataclass(frozen=True)
class Choice:
    """What an op runs with: a config for each of its roles, and whether Triton is the faster way at all."""

    configs: dict[str, Config]
    use_triton: bool


@dataclass(frozen=True, order=True)
class Key:
    """What a tuned entry holds for. ``rows`` is a :func:`row_bucket`, ``dtype`` a name such as "bfloat16"."""

    device: str
    op: str
    widths: tuple[int, int]
    num_experts: int
    rows: int
    dtype: str


@dataclass(frozen=True)
class Entry:
    """A tuned entry: the winner and the evidence for it.

    Attributes:
        key: what it holds for.
        choice: the winner. Its configs are the best of Triton even where PyTorch won.
        triton_ms, default_ms, pytorch_ms: median milliseconds of the best configs, of the default ones and of plain
            PyTorch; the first two are None if no config, or not the default one, ran with the right results.
        error, pytorch_error: largest error against float64, in units of the result's largest magnitude, of the best
            configs (None like its time) and of plain PyTorch.
        versions: of torch, triton and beit3_fast.
        date: when, ISO 8601, UTC.
    """

    key: Key
    choice: Choice
    triton_ms: float | None
    default_ms: float | None
    pytorch_ms: float
    error: float | None
    pytorch_error: float
    versions: dict[str, str]
    date: str


def row_bucket(num_rows: int) -> int:
    """`num_rows` rounded up to a number with three significant binary digits, at least 16: 16, 20, 24, 28, 32, 40, ...

    A bucket is at most a quarter larger than what is in it, so that what is best for one is good for the other; and
    there are few: four from one power of two to the next.

    Raises:
        ValueError: a negative count.
    """
    if num_rows < 0:
        raise ValueError(f"num_rows must not be negative, got {num_rows}")
    step = 1 << max((num_rows - 1).bit_length() - 3, 2)
    return max(16, -(-num_rows // step) * step)


def choose(
    op: str, device: torch.device, dtype: torch.dtype, num_rows: int, num_experts: int, widths: tuple[int, int]
) -> Choice:
    """The tuned configs of an op for the nearest row bucket, or the default ones for the device and the bucket.

    It is asked at every call and remembers its answers by bucket: ragged batches find theirs after a few steps.

    Args:
        op: a key of :data:`ROLES`.
        device: of the tensors. Anything but a CUDA device (tensors under Triton's interpreter or a simulator) counts
            as compute capability 8.0 and is never tuned.
        dtype: of the rows. Those of fp32 are tuned with full-precision products; with TF32 they run with the same.
        num_rows: N. num_experts: E.
        widths: (in_width, out_width) of a linear layer, (width, hidden) of the feed-forward block.

    Returns:
        The choice; it is shared between callers and must not be changed.

    Raises:
        ValueError: an unknown op, or a negative number of rows.
    """
    return _choose(op, device, dtype, row_bucket(num_rows), num_experts, widths)


@functools.lru_cache(maxsize=4096)
def _choose(
    op: str, device: torch.device, dtype: torch.dtype, rows: int, num_experts: int, widths: tuple[int, int]
) -> Choice:
    if op not in ROLES:
        raise ValueError(f"op must be one of {', '.join(ROLES)}, got {op!r}")
    kernels, arch = _kernels(op), _architecture(device)
    if device.type == "cuda":
        key = Key(torch.cuda.get_device_name(device), op, widths, num_experts, rows, _dtype_name(dtype))
        tuned = _nearest(key, kernels.valid_configs(arch, dtype, *widths))
        if tuned is not None:
            return tuned
    defaults = kernels.default_configs(arch, dtype, rows, num_experts, *widths)
    return Choice({role: defaults[role] for role in ROLES[op]}, use_triton=True)


def _nearest(wanted: Key, valid: dict[str, list[Config]]) -> Choice | None:
    """The choice whose number of rows has the smallest ratio to the wanted one, whichever is larger; of two the one of
    fewer rows. None if no entry for the rest of the key is valid and within :data:`REACH`."""

    def ratio(rows: int) -> float:
        return max(rows / wanted.rows, wanted.rows / rows)

    found = {
        key.rows: entry.choice
        for key, entry in _tuned().items()
        if replace(key, rows=wanted.rows) == wanted
        and ratio(key.rows) <= REACH
        and _is_valid(entry.choice, key.op, valid)
    }
    return found[min(sorted(found), key=ratio)] if found else None


def forget() -> None:
    """Read the file again at the next :func:`choose`."""
    _choose.cache_clear()
    _tuned.cache_clear()


def _kernels(op: str) -> Any:
    """The kernel file of `op`; imported here because importing it imports Triton."""
    return importlib.import_module(f".kernels.{op.removesuffix('_backward')}", __package__)


def _architecture(device: torch.device) -> int:
    """Compute capability, 80 for 8.0; 942 for any AMD GPU, whose (9, 0) is not Hopper: 64 KB of shared memory."""
    if device.type != "cuda":
        return 80
    if torch.version.hip is not None:
        return 942
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_valid(choice: Choice, op: str, valid: dict[str, list[Config]]) -> bool:
    """Whether the kernels of today still take the configs."""
    return choice.configs.keys() == set(ROLES[op]) and all(choice.configs[role] in valid[role] for role in ROLES[op])


# ---- the file --------------------------------------------------------------------------------------------------------


def cache_file() -> Path:
    """Where the winners are kept."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "beit3_fast" / "tuned.json"


@functools.lru_cache(maxsize=1)
def _tuned() -> dict[Key, Entry]:
    """The file's entries, read once a process."""
    return read_entries()


def read_entries() -> dict[Key, Entry]:
    """The entries of the file; none if there is no file or it has another schema.

    A damaged file is no error, a warning names it: it costs speed, not results.
    """
    path = cache_file()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            return {}
        return {entry.key: entry for entry in map(_from_record, content["entries"])}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"{path} is damaged ({type(error).__name__}: {error}); the default configs are used. "
            "`beit3-fast tune` writes it anew",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


def _from_record(record: dict[str, Any]) -> Entry:
    configs = {role: Config(**values) for role, values in record["configs"].items()}
    key = Key(
        record["device"],
        record["op"],
        tuple(record["widths"]),
        record["num_experts"],
        record["rows"],
        record["dtype"],
    )
    return Entry(
        key,
        Choice(configs, record["use_triton"]),
        versions=record["versions"],
        date=record["date"],
        **{name: record[name] for name in _MEASURED},
    )


def _to_record(entry: Entry) -> dict[str, Any]:
    return {
        **asdict(entry.key),
        "configs": {role: config.to_dict() for role, config in entry.choice.configs.items()},
        "use_triton": entry.choice.use_triton,
        **{name: getattr(entry, name) for name in _MEASURED},
        "versions": entry.versions,
        "date": entry.date,
    }


def store(entries: Iterable[Entry]) -> None:
    """Put entries into the file, over those of the same key; the file is replaced in one step.

    Of two processes that write at the same moment, one may lose its entries; neither damages the file.

    Raises:
        OSError: the file cannot be written.
    """
    _write(read_entries() | {entry.key: entry for entry in entries})


def clear(device: str) -> int:
    """Remove the entries of the device of that name from the file; returns how many there were.

    Raises:
        OSError: the file cannot be written.
    """
    entries = read_entries()
    kept = {key: entry for key, entry in entries.items() if key.device != device}
    if len(kept) < len(entries):
        _write(kept)
    return len(entries) - len(kept)


def _write(entries: dict[Key, Entry]) -> None:
    from .bench.files import write_json

    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"schema": SCHEMA, "entries": [_to_record(entries[key]) for key in sorted(entries)]})
    forget()


# ---- the search ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What tuning one key gave.

    Attributes:
        entry: what was stored; None if nothing could be measured.
        skipped: "role config: reason" for every config that did not run or failed parity; why there is no entry.
    """

    key: Key
    entry: Entry | None
    skipped: tuple[str, ...]


def tune(
    *,
    device: torch.device | str = "cuda",
    ops: Sequence[str] = tuple(ROLES),
    sizes: Sequence[tuple[int, int]] = SIZES,
    rows: Sequence[int] = ROWS,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    num_experts: int = 2,
    exhaustive: bool = False,
    workers: int | None = None,
    timer: Timer | None = None,
    progress: Callable[[float, str], None] = lambda done, what: None,
) -> list[Outcome]:
    """Time the promising configs of every role, one role after the other, and store the winners.

    They are compiled first, by as many processes as there are cores. A config is timed only after its results passed
    the parity rule of ``bench/parity.py``; what is timed is a CUDA graph of calls on operands that take turns. The best
    configs, the default ones and plain PyTorch (``<op>_reference``, and its autograd for a backward) are then timed in
    turns; where PyTorch is the fastest, that is stored. Every key is stored as soon as it is done. fp32 is tuned with
    full-precision products.

    The processes start as new Pythons do: a script calls this under ``if __name__ == "__main__":``.

    Args:
        device: a GPU.
        ops: keys of :data:`ROLES`.
        sizes: (width D, hidden width F) of models: linear layers D -> 3D and D -> D, feed-forward blocks D -> F -> D.
        rows: row counts; each stands for its :func:`row_bucket`.
        dtypes: of fp32, bf16 and fp16.
        num_experts: E; the first has three quarters of the rows.
        exhaustive: time every valid config: several times as many, and hours.
        workers: processes that compile; by default one for each core.
        timer: see :data:`Timer`; by default :func:`cuda_median`.
        progress: called with the finished share and what is being timed.

    Raises:
        ValueError: an argument that is not one of the above; no GPU, and no timer of the caller's own.
        OSError: the file cannot be written.
    """
    from .bench import static
    from .bench.timing import side_stream

    place = torch.device(device)
    keys = _keys(place, ops, sizes, rows, dtypes, num_experts, has_timer=timer is not None)
    outcomes = []
    with contextlib.ExitStack() as stack:
        if place.type == "cuda":
            stack.enter_context(torch.cuda.device(place))  # launches go to the current GPU
            stack.enter_context(side_stream(place))  # and a captured backward to the stream of its forward
        compiled = _Compiled(stack.enter_context(static.each_in_processes(static.why_not, workers or static.cores())))
        for index, key in enumerate(keys):

            def advance(share: float, what: str, index: int = index, key: Key = key) -> None:
                progress((index + share) / len(keys), f"{describe(key)}: {what}")

            outcome = _tune_key(key, place, exhaustive, compiled, timer or cuda_median, advance)
            if outcome.entry is not None:
                store([outcome.entry])
            outcomes.append(outcome)
    return outcomes


def cuda_median(run: Callable[[], object]) -> float:
    """Milliseconds of a call on the current GPU, from what ``bench.timing.prepared`` gives."""
    from .bench.timing import median_of

    return median_of(run, torch.device("cuda", torch.cuda.current_device())) * 1e-6


def describe(key: Key) -> str:
    """The key in a few words, without its device."""
    width, other = key.widths
    return f"{key.op} {width} x {other}, {key.rows} rows, {key.dtype}"


def _keys(
    device: torch.device,
    ops: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    dtypes: Sequence[torch.dtype],
    num_experts: int,
    has_timer: bool,
) -> list[Key]:
    """What is to be tuned, without repetition; arguments are checked."""
    for op in ops:
        if op not in ROLES:
            raise ValueError(f"ops must be among {', '.join(ROLES)}, got {op!r}")
    for dtype in dtypes:
        if dtype not in _DTYPES.values():
            raise ValueError(f"dtypes must be among {', '.join(_DTYPES)}, got {dtype}")
    for name, values in (
        ("sizes", [n for size in sizes for n in size]),
        ("rows", rows),
        ("num_experts", [num_experts]),
    ):
        if not values or min(values) < 1:
            raise ValueError(f"{name} must be positive, got {values}")
    if not has_timer and (device.type != "cuda" or not torch.cuda.is_available()):
        raise ValueError(f"tuning needs a CUDA GPU: PyTorch sees none at device {str(device)!r}")
    name = _device_name(device)
    keys = []
    for dtype, op, (width, hidden) in itertools.product(dtypes, ops, sizes):
        for widths in [(width, hidden)] if "ffn" in op else [(width, 3 * width), (width, width)]:
            buckets = [row_bucket(num_rows) for num_rows in rows]
            keys += [Key(name, op, widths, num_experts, bucket, _dtype_name(dtype)) for bucket in buckets]
    return list(dict.fromkeys(keys))


class _Compiled:
    """Compiles the launches of many configs at once, before they are made; remembers what must not run."""

    def __init__(self, each: Callable[..., Iterable[tuple[Any, str | None]]]) -> None:
        """``each(builds)`` yields (build, why it must not run or None)."""
        self._each = each
        self._found: dict[Any, str | None] = {}

    def why_not(self, problem: _Problem, tries: Sequence[dict[str, Config]]) -> list[str | None]:
        """For each of the configs why they must not run, None if they may.

        Nothing is compiled for tensors that are not on an NVIDIA GPU: what runs there is not what would be compiled.
        """
        from .bench.static import build_of
        from .kernels.launch import record

        if problem.device.type != "cuda" or torch.version.hip is not None:
            return [None] * len(tries)
        arch, builds = _architecture(problem.device), []
        for configs in tries:
            with record() as launches:
                problem.run(configs)
            builds.append([build_of(launch, problem.key.dtype, arch) for launch in launches])
        new = dict.fromkeys(build for some in builds for build in some if build not in self._found)
        self._found.update(self._each(new))
        return [next((why for build in some if (why := self._found[build])), None) for some in builds]


def _tune_key(
    key: Key,
    device: torch.device,
    exhaustive: bool,
    compiled: _Compiled,
    timer: Timer,
    progress: Callable[[float, str], None],
) -> Outcome:
    import triton

    from .bench.timing import MIN_ROUNDS, CaptureError, in_turn, interleave, prepared

    failures = (RuntimeError, triton.TritonError)  # of a launch: out of memory of either kind, does not compile
    kernels, dtype = _kernels(key.op), _DTYPES[key.dtype]
    defaults = kernels.default_configs(_architecture(device), dtype, key.rows, key.num_experts, *key.widths)
    default = {role: defaults[role] for role in ROLES[key.op]}
    candidates = _candidates(key, device, default, exhaustive)
    progress(0.0, "float64")
    try:
        problem = _Problem(key, device)
    except failures as error:
        return Outcome(key, None, (f"could not be set up: {_first_line(error)}",))
    skipped: list[str] = []
    errors: dict[frozenset[tuple[str, Config]], float] = {}  # of the configs that passed

    def passes(configs: dict[str, Config], label: str) -> bool:
        reason, error = problem.check(configs)
        if reason:
            skipped.append(f"{label}: {reason}")
        else:
            errors[frozenset(configs.items())] = error
        return not reason

    best, done, total = default, 0, sum(map(len, candidates.values()))
    for role in default:
        progress(done / total, f"compiling {role}")
        tries = [{**best, role: config} for config in candidates[role]]  # a launch may depend on an earlier role's tile
        fastest = math.inf
        for configs, forbidden in zip(tries, compiled.why_not(problem, tries), strict=True):
            label = f"{role} {configs[role]}"
            progress(done / total, label)
            try:
                if forbidden is not None:
                    skipped.append(f"{label}: {forbidden}")
                elif passes(configs, label):
                    milliseconds = timer(prepared(problem.calls(configs), device))
                    if milliseconds < fastest:
                        fastest, best = milliseconds, configs
            except failures as error:
                errors.pop(frozenset(configs.items()), None)  # its results may be right and yet it cannot be timed
                skipped.append(f"{label}: {_first_line(error)}")
            done += 1

    # The fastest of a hundred noisy times is partly luck: what decides is a second measurement, side by side.
    progress(1.0, "PyTorch, default and best in turns")
    try:
        plain = prepared(problem.plain_calls(), device)
    except CaptureError as error:
        skipped.append(f"PyTorch: timed with the host's time: {_first_line(error)}")
        plain = in_turn(problem.plain_calls())
    contenders: dict[str, Callable[[], object]] = {"pytorch": plain}
    for name, configs in (("default", default), ("best", best)):
        if frozenset(configs.items()) in errors:
            contenders[name] = prepared(problem.calls(configs), device)
    timing = interleave(contenders, rounds=MIN_ROUNDS, stopwatch=timer)
    times = {name: timing.time(name).median for name in contenders}
    if "best" not in times or times.get("default", math.inf) <= times["best"]:
        best = default
    triton_ms = min((times[name] for name in ("default", "best") if name in times), default=None)
    entry = Entry(
        key,
        Choice(best, use_triton=triton_ms is not None and triton_ms <= times["pytorch"]),
        triton_ms,
        times.get("default"),
        times["pytorch"],
        errors.get(frozenset(best.items())),
        problem.plain_error,
        versions=_versions(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    return Outcome(key, entry, tuple(skipped))


def _candidates(
    key: Key, device: torch.device, default: dict[str, Config], exhaustive: bool
) -> dict[str, list[Config]]:
    """The configs to be timed for each role, the default one first."""
    arch, dtype = _architecture(device), _DTYPES[key.dtype]
    valid = _kernels(key.op).valid_configs(arch, dtype, *key.widths)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 108
    found = {}
    for role, config in default.items():
        timed = valid[role] if exhaustive else promising(valid[role], _product(key, role), arch, dtype, processors)
        found[role] = list(dict.fromkeys([config, *timed]))
    return found


def _product(key: Key, role: str) -> Product:
    """What the role's launch computes."""
    rows = [stop - start for start, stop in itertools.pairwise(_offsets(key.rows, key.num_experts))]
    width, other = key.widths  # a linear layer's input and output, a block's rows and hidden rows
    if role in ("dweight", "dfc1", "dfc2"):
        outputs, inputs = (width, other) if role == "dfc2" else (other, width)
        return Product(tuple((outputs, depth) for depth in rows), inputs)
    columns = other if role in ("forward", "fc1", "dhidden") else width
    return Product(tuple((count, 1) for count in rows), columns)


class _Problem:
    """Inputs of one key, several sets of the same values that take turns, what they should give, and two ways to
    compute it."""

    def __init__(self, key: Key, device: torch.device) -> None:
        from .bench.parity import error
        from .bench.timing import rotations

        self.key, self.device, self._dtype, self._kernels = key, device, _DTYPES[key.dtype], _kernels(key.op)
        self._backward = key.op.endswith("_backward")
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * scale).to(self._dtype)

        experts, (width, other) = key.num_experts, key.widths
        inputs: tuple[Tensor, ...] = (
            normal(key.rows, width),
            normal(experts, other, width, scale=width**-0.5),
            normal(experts, other),
        )
        if "ffn" in key.op:
            inputs += (
                1 + normal(experts, other, scale=0.5),
                normal(experts, other),
                normal(experts, width, other, scale=other**-0.5),
                normal(experts, width),
            )
        dy = normal(key.rows, width if "ffn" in key.op else other)
        host_offsets = torch.tensor(_offsets(key.rows, experts), dtype=torch.int32)
        self._offsets = host_offsets.to(device)
        self._host_offsets = host_offsets  # plain PyTorch needs them on the host, and would wait for those of a GPU
        saved: tuple[Tensor, ...] = ()
        if key.op == "multiway_ffn_backward":
            configs = self._kernels.default_configs(_architecture(device), self._dtype, key.rows, experts, *key.widths)
            saved = self._kernels.forward(*inputs, self._offsets, save=True, configs=configs)[1:]
        self._truth = self._make_plain(inputs, dy, torch.float64)()
        plain = self._make_plain(inputs, dy, self._dtype)()
        self._plain_errors = [error(*pair) for pair in zip(plain, self._truth, strict=True)]
        self.plain_error = max(error.maximum for error in self._plain_errors)
        bytes_per_call = sum(tensor.nbytes for tensor in (*inputs, *saved, *plain, *(dy,) * self._backward))
        self._sets = [(inputs, dy, saved)]
        if device.type == "cuda":
            self._sets += [
                (_clones(inputs), dy.clone(), _clones(saved)) for _ in range(rotations(bytes_per_call, device) - 1)
            ]

    def run(self, configs: dict[str, Config], turn: int = 0) -> tuple[Tensor, ...]:
        """Outputs or gradients by the Triton kernels, from a set of inputs."""
        inputs, dy, saved = self._sets[turn]
        if not self._backward:
            return self._kernels.forward(*inputs, self._offsets, configs=configs)[:1]
        if "ffn" not in self.key.op:
            return self._kernels.backward(dy, *inputs[:2], self._offsets, configs=configs)
        x, fc1_weight, _, norm_weight, norm_bias, fc2_weight, _ = inputs
        return self._kernels.backward(
            dy, x, fc1_weight, norm_weight, norm_bias, fc2_weight, self._offsets, None, *saved, configs=configs
        )

    def calls(self, configs: dict[str, Config]) -> list[Callable[[], object]]:
        """:meth:`run` on every set."""
        return [functools.partial(self.run, configs, turn) for turn in range(len(self._sets))]

    def plain_calls(self) -> list[Callable[[], object]]:
        """The same by plain PyTorch, on every set; the forward before a backward runs here."""
        return [self._make_plain(inputs, dy, self._dtype) for inputs, dy, _ in self._sets]

    def check(self, configs: dict[str, Config]) -> tuple[str, float]:
        """("" or what is wrong with the results, their largest error)."""
        from .bench.parity import error, judge

        largest = 0.0
        for result, truth, plain in zip(self.run(configs), self._truth, self._plain_errors, strict=True):
            measured = error(result, truth)
            verdict = judge(measured, self._dtype, plain)
            if not verdict.ok:
                return verdict.reason, measured.maximum
            largest = max(largest, measured.maximum)
        return "", largest

    def _make_plain(
        self, inputs: tuple[Tensor, ...], dy: Tensor, dtype: torch.dtype
    ) -> Callable[[], tuple[Tensor, ...]]:
        """The same outputs or gradients by plain PyTorch in `dtype`; a backward's forward has been run."""
        from . import ops

        reference: Callable[..., Tensor] = (
            ops.multiway_ffn_reference if "ffn" in self.key.op else ops.multiway_linear_reference
        )
        leaves = [tensor.detach().to(dtype).requires_grad_(self._backward) for tensor in inputs]
        if not self._backward:
            return lambda: (reference(*leaves, self._host_offsets),)
        out = reference(*leaves, self._host_offsets)
        return lambda: torch.autograd.grad(out, leaves, dy.to(dtype), retain_graph=True)


def _clones(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.clone() for tensor in tensors)


def _offsets(num_rows: int, num_experts: int) -> list[int]:
    """Three quarters of the rows to the first expert, as images have them, and tiles that end in part."""
    first = num_rows * 3 // 4 - 1
    rest = num_rows - first
    return [0, *(first + rest * i // (num_experts - 1) for i in range(num_experts - 1)), num_rows]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _versions() -> dict[str, str]:
    import triton

    from ._version import __version__

    return {"torch": torch.__version__, "triton": triton.__version__, "beit3_fast": __version__}


# ---- the command -----------------------------------------------------------------------------------------------------


def command(
    *,
    width: int | None = None,
    hidden: int | None = None,
    rows: Sequence[int] = (),
    dtypes: Sequence[str] = (),
    ops: Sequence[str] = (),
    experts: int = 2,
    exhaustive: bool = False,
    show: bool = False,
    remove: bool = False,
) -> bool:
    """``beit3-fast tune``: True if every key was tuned and its default configs gave the right results.

    Args:
        width, hidden: of a model; base and large without them. `hidden` is four times `width` by default.
        rows, dtypes, ops: :func:`tune`'s defaults when empty; dtypes by name.
        exhaustive: time every valid config.
        show: print what is stored instead. remove: remove this device's entries instead.

    Raises:
        ValueError: no CUDA GPU, an argument out of range.
        OSError: the file cannot be written.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from .bench.files import check_writable
    from .bench.report import console

    shown = console()
    if show:
        entries = read_entries()
        for name in sorted({key.device for key in entries}):
            shown.print(_table([entries[key] for key in sorted(entries) if key.device == name], name))
        shown.print(f"{len(entries)} entries in {cache_file()}", highlight=False, soft_wrap=True)
        return True
    if not torch.cuda.is_available():
        raise ValueError("tune needs a CUDA GPU: PyTorch sees none")
    device = torch.device("cuda", torch.cuda.current_device())
    name = _device_name(device)
    if remove:
        shown.print(f"removed {clear(name)} entries of {name}", highlight=False, soft_wrap=True)
        return True
    if width is None and hidden is not None:
        raise ValueError("--hidden needs --width")
    cache_file().parent.mkdir(parents=True, exist_ok=True)
    check_writable(cache_file(), str(cache_file()))
    sizes = SIZES if width is None else [(width, 4 * width if hidden is None else hidden)]
    with Progress(BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), console=shown) as bar:
        task = bar.add_task("starting", total=1.0)
        outcomes = tune(
            device=device,
            ops=ops or tuple(ROLES),
            sizes=sizes,
            rows=rows or ROWS,
            dtypes=[_DTYPES[dtype] for dtype in dtypes] or [torch.bfloat16],
            num_experts=experts,
            exhaustive=exhaustive,
            progress=lambda done, what: bar.update(task, completed=done, description=what),
        )
        bar.update(task, completed=1.0, description="done")
    shown.print(_table([outcome.entry for outcome in outcomes if outcome.entry is not None], name))
    for outcome in outcomes:
        for reason in outcome.skipped:
            shown.print(f"skipped: {describe(outcome.key)}: {reason}", highlight=False, markup=False, soft_wrap=True)
    return all(outcome.entry is not None and outcome.entry.default_ms is not None for outcome in outcomes)


def _table(entries: Sequence[Entry], title: str) -> Any:
    """A rich table of entries of one device."""
    from rich.table import Table

    shown = Table(title=title, title_justify="left", title_style="bold")
    for column in ("op", "widths", "experts", "rows", "dtype", "winner"):
        shown.add_column(column, overflow="fold")
    for column in ("Triton", "PyTorch", "over PyTorch", "over default"):
        shown.add_column(column, justify="right", no_wrap=True)
    for entry in entries:
        key = entry.key
        configs = "\n".join(f"{role} {config}" for role, config in entry.choice.configs.items())
        shown.add_row(
            key.op,
            f"{key.widths[0]} x {key.widths[1]}",
            str(key.num_experts),
            str(key.rows),
            key.dtype,
            configs if entry.choice.use_triton else "PyTorch",
            _milliseconds(entry.triton_ms),
            _milliseconds(entry.pytorch_ms),
            _ratio(entry.pytorch_ms, entry.triton_ms),
            _ratio(entry.default_ms, entry.triton_ms),
        )
    return shown


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} ms"


def _ratio(slow: float | None, fast: float | None) -> str:
    return "" if slow is None or fast is None else f"{slow / fast:.2f}x"
