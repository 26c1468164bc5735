"""Each of our matrix products alone, by tile: which config is the fastest, and whether the default is.

A product is found among the launches that an op would make (``kernels.launch.record``): they are made once, so that
every operand holds what it would, and then the one launch is timed. On a CPU nothing can be launched: there the whole
op is timed in its place, to see that the section works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from beit3_fast.kernels.config import Config
from beit3_fast.kernels.launch import Launch
from beit3_fast.kernels.launch import record as recorded
from torch import Tensor

from beit3_fast import ops

from ..clock import microseconds
from ..record import Missing, Recorder
from ..setting import Gemm, Setting, Size, models_and_batches

WIDE = Config(128, 256, 64, 8, 3)
CANDIDATES = (
    WIDE,
    Config(128, 256, 64, 8, 4),
    Config(128, 128, 64, 4, 3),
    Config(64, 128, 64, 4, 4),
    Config(128, 128, 64, 8, 3),
    Config(128, 128, 64, 8, 4),
    Config(256, 128, 64, 8, 3),
    Config(64, 256, 64, 4, 3),
    Config(64, 64, 64, 4, 4),
)
FEW = (WIDE, Config(128, 128, 64, 4, 3), Config(64, 128, 64, 4, 4))
"""For the large model."""

ROLES = ("forward", "dx", "dw")

KERNELS = {
    ("fc1", "forward"): "_fc1_kernel",
    ("fc2", "forward"): "_fc2_kernel",
    ("fc2", "dx"): "_hidden_gradient_kernel",
}
"""Which of its op's launches a product is; others are all that their op launches."""


@dataclass(frozen=True)
class Product:
    """One of a layer's products in one :data:`ROLES`, at one batch."""

    model: Size
    gemm: Gemm
    role: str
    samples: int


def products(setting: Setting) -> Iterator[Product]:
    """What matters most first."""
    for model, samples in models_and_batches(setting.sizes):
        for role in ROLES:
            for gemm in model.gemms:
                yield Product(model, gemm, role, samples)


def run(record: Recorder, setting: Setting) -> None:
    for product in products(setting):
        for name, config in configs(setting, product).items():
            record.measure(
                "role",
                partial(_measured, setting, product, config),
                **{"model": product.model.name, "gemm": product.gemm.name, "role": product.role},
                **{"rows": setting.rows(product.samples), "config": str(config), "as": name},
            )


def configs(setting: Setting, product: Product) -> dict[str, Config]:
    """By name: "default", the present one; "before", that of version 0.1 on sm_90; the candidates under their own.
    Two that are equal are one, named "default, before"."""
    chosen: dict[Config, list[str]] = {}
    chosen.setdefault(_default(setting, product), []).append("default")
    chosen.setdefault(before(product, setting.rows(product.samples)), []).append("before")
    for candidate in CANDIDATES if product.model == setting.base else FEW:
        chosen.setdefault(candidate, [])
    return {", ".join(names) or str(config): config for config, names in chosen.items()}


def before(product: Product, rows: int) -> Config:
    """The default of version 0.1 on sm_90 in 16 bits, written down: what later defaults are held against."""
    fan_in, fan_out = product.gemm.fan_in, product.gemm.fan_out
    if product.role == "dw":
        if fan_in * fan_out > 2_000_000:
            return Config(128, 128, 128, 8, 2)
        return Config(64, 128 if fan_in * fan_out > 1_000_000 else 64, 128, 4, 2)
    width = fan_in if product.role == "dx" else fan_out
    if rows < 1000:
        if width > 3000:
            return Config(16, 256, 64, 4, 3)
        return Config(16, 128 if width > 2000 else 64, 128, 4, 2)
    return Config(128, 64 if rows < 5000 and width < 2000 else 128, 128, 8, 2)


def _default(setting: Setting, product: Product) -> Config:
    from beit3_fast.kernels import multiway_ffn, multiway_linear

    arch = 90
    if not setting.dry:
        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
    model, gemm, rows = product.model, product.gemm, setting.rows(product.samples)
    if (gemm.name, product.role) in (("fc1", "forward"), ("fc2", "forward"), ("fc2", "dx")):
        defaults = multiway_ffn.default_configs(arch, torch.bfloat16, rows, 2, model.width, model.hidden)
        return defaults["dhidden" if product.role == "dx" else gemm.name]
    defaults = multiway_linear.default_configs(arch, torch.bfloat16, rows, 2, gemm.fan_in, gemm.fan_out)
    return defaults["dweight" if product.role == "dw" else product.role]


def _measured(setting: Setting, product: Product, config: Config) -> Mapping[str, Any]:
    gemm, rows = product.gemm, setting.rows(product.samples)
    elements = rows * (gemm.fan_in + gemm.fan_out) + 2 * gemm.fan_in * gemm.fan_out
    try:
        taken = microseconds(lambda index: launch_of(setting, product, config), 2 * elements, setting)
    except Exception as error:
        if type(error).__name__ == "OutOfResources":  # Triton's: a candidate that this chip cannot hold is no failure
            raise Missing(str(error)) from None
        raise
    return {"us": taken, "tflop_s": gemm.flops(rows) / taken / 1e6}


def launch_of(setting: Setting, product: Product, config: Config) -> Callable[[], object]:
    """A function that makes the product's launch, or its launches, on operands of its own.

    Raises:
        LookupError: its kernel is not among the launches that the op makes.
    """
    operands = Operands(setting, product)
    with recorded() as launches:
        whole = operands.make(config)
    names = [launch.kernel.fn.__name__ for launch in launches]
    kernel = KERNELS.get((product.gemm.name, product.role))
    timed = [launch for launch, name in zip(launches, names, strict=True) if kernel in (None, name)]
    if not timed:
        raise LookupError(f"{kernel or 'a kernel'} is not among the launches, {', '.join(names) or 'none'}")
    if setting.dry:
        return operands.plain
    for launch in launches:
        _make(launch)

    def run() -> object:
        for launch in timed:
            _make(launch)
        return whole  # what the launch writes into lives as long as the call

    return run


def _make(launch: Launch) -> None:
    launch.kernel[launch.grid](*launch.args, **launch.options)


class Operands:
    """What a product's op takes; random numbers."""

    def __init__(self, setting: Setting, product: Product) -> None:
        self._device = setting.device
        self.model, self.gemm, self.role = product.model, product.gemm, product.role
        self.offsets = setting.layout(product.samples).expert_offsets
        self.rows = setting.rows(product.samples)
        self.x = self._drawn(self.rows, self.gemm.fan_in)
        self.dy = self._drawn(self.rows, self.gemm.fan_out)
        self.weight = self._weight(self.gemm.fan_out, self.gemm.fan_in)

    def _drawn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self._device, dtype=dtype)

    def _weight(self, fan_out: int, fan_in: int) -> Tensor:
        return self._drawn(2, fan_out, fan_in) * fan_in**-0.5

    def plain(self) -> object:
        """The product by the op, on whatever device."""
        return ops.multiway_linear(self.x, self.weight, None, self.offsets)

    def make(self, config: Config) -> object:
        """Calls the kernels' own function with the config; its results."""
        if self.role == "forward":
            return self._block(config) if self.gemm.name in ("fc1", "fc2") else self._linear(config)
        if (self.gemm.name, self.role) == ("fc2", "dx"):
            return self._hidden_gradient(config)
        return self._gradient(config)

    def _linear(self, config: Config) -> object:
        from beit3_fast.kernels import multiway_linear

        bias = self._drawn(2, self.gemm.fan_out)
        residual = self.dy if self.gemm.name == "out" else None
        given = self.x, self.weight, bias, self.offsets
        return multiway_linear.forward(*given, residual=residual, configs={"forward": config})

    def _gradient(self, config: Config) -> object:
        from beit3_fast.kernels import multiway_linear

        sizes = self.rows, 2, self.gemm.fan_in, self.gemm.fan_out
        configs = multiway_linear.default_configs(80, torch.bfloat16, *sizes)
        configs["dx" if self.role == "dx" else "dweight"] = config
        given = self.dy, self.x, self.weight, self.offsets
        return multiway_linear.backward(
            *given, needs_x=self.role == "dx", needs_parameters=self.role == "dw", configs=configs
        )

    def _block(self, config: Config) -> object:
        from beit3_fast.kernels import multiway_ffn

        width, hidden = self.model.width, self.model.hidden
        configs = multiway_ffn.default_configs(80, torch.bfloat16, self.rows, 2, width, hidden)
        configs[self.gemm.name] = config
        return multiway_ffn.forward(
            self._drawn(self.rows, width),
            self._weight(hidden, width),
            self._drawn(2, hidden),
            self._drawn(2, hidden),
            self._drawn(2, hidden),
            self._weight(width, hidden),
            self._drawn(2, width),
            self.offsets,
            configs=configs,
        )

    def _hidden_gradient(self, config: Config) -> object:
        from beit3_fast.kernels import multiway_ffn

        width, hidden, rows = self.model.width, self.model.hidden, self.rows
        configs = multiway_ffn.default_configs(80, torch.bfloat16, rows, 2, width, hidden)
        configs["dhidden"] = config
        return multiway_ffn.backward(
            self._drawn(rows, width),
            self._drawn(rows, width),
            self._weight(hidden, width),
            self._drawn(2, hidden),
            self._drawn(2, hidden),
            self._weight(width, hidden),
            self.offsets,
            None,
            pre=self._drawn(rows, hidden),
            mean=self._drawn(rows, dtype=torch.float32),
            rstd=self._drawn(rows, dtype=torch.float32).abs(),
            branch=self._drawn(rows, width),
            folded=self._drawn(2, 2, width, dtype=torch.float32),
            needs_x=False,
            needs_parameters=False,
            configs=configs,
        )
