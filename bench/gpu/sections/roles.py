"""Each of our matrix products alone, by tile: which config is the fastest, and whether the default is.

A product is found among the launches that an op would make (``kernels.launch.record``): they are made once, so that
every operand holds what it would, and then the one launch is timed. On a CPU nothing can be launched: there the whole
op is timed in its place, to see that the section works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from beit3_fast.kernels.config import Config
from beit3_fast.kernels.launch import Launch
from beit3_fast.kernels.launch import record as recorded

from ..clock import microseconds
from ..record import Recorder
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

KERNELS = {
    ("qkv", "forward"): "_linear_kernel",
    ("out", "forward"): "_linear_kernel",
    ("fc1", "forward"): "_fc1_kernel",
    ("fc2", "forward"): "_fc2_kernel",
    ("fc2", "dx"): "_hidden_gradient_kernel",
}
"""Which kernel a role is; the others are ``_linear_kernel`` for dX and ``_weight_gradient_kernel`` for dW."""


def run(record: Recorder, setting: Setting) -> None:
    for model, samples in models_and_batches(setting.sizes):
        for role in ("forward", "dx", "dw"):
            for gemm in model.gemms:
                for name, config in configs(setting, model, gemm, role, samples).items():
                    record.measure(
                        "role",
                        _measured(setting, model, gemm, role, samples, config),
                        **{"model": model.name, "gemm": gemm.name, "role": role},
                        **{"rows": setting.rows(samples), "config": str(config), "as": name},
                    )


def configs(setting: Setting, model: Size, gemm: Gemm, role: str, samples: int) -> dict[str, Config]:
    """By name: "default", the present one; "before", that of version 0.1 on sm_90; the candidates under their own.
    Two that are equal are one, named "default, before"."""
    chosen: dict[Config, list[str]] = {}
    chosen.setdefault(_default(setting, model, gemm, role, samples), []).append("default")
    chosen.setdefault(before(setting, gemm, role, samples), []).append("before")
    for candidate in CANDIDATES if model == setting.base else FEW:
        chosen.setdefault(candidate, [])
    return {", ".join(names) or str(config): config for config, names in chosen.items()}


def before(setting: Setting, gemm: Gemm, role: str, samples: int) -> Config:
    """The default of version 0.1 on sm_90 in 16 bits, written down: what later defaults are held against."""
    size = gemm.fan_in * gemm.fan_out
    if role == "dw" and size > 2_000_000:
        return Config(128, 128, 128, 8, 2)
    if role == "dw":
        return Config(64, 128 if size > 1_000_000 else 64, 128, 4, 2)
    width = gemm.fan_in if role == "dx" else gemm.fan_out
    if setting.rows(samples) < 1000:
        block_n = 64 if width < 2000 else 128 if width < 3000 else 256
        return Config(16, block_n, 64 if block_n == 256 else 128, 4, 3 if block_n == 256 else 2)
    narrow = setting.rows(samples) < 5000 and width < 2000
    return Config(128, 64 if narrow else 128, 128, 8, 2)


def _default(setting: Setting, model: Size, gemm: Gemm, role: str, samples: int) -> Config:
    from beit3_fast.kernels import multiway_ffn, multiway_linear

    arch = 90
    if not setting.dry:
        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
    rows = setting.rows(samples)
    if (gemm.name, role) in (("fc1", "forward"), ("fc2", "forward"), ("fc2", "dx")):
        defaults = multiway_ffn.default_configs(arch, torch.bfloat16, rows, 2, model.width, model.hidden)
        return defaults["dhidden" if role == "dx" else gemm.name]
    defaults = multiway_linear.default_configs(arch, torch.bfloat16, rows, 2, gemm.fan_in, gemm.fan_out)
    return defaults["dweight" if role == "dw" else role]


def _measured(
    setting: Setting, model: Size, gemm: Gemm, role: str, samples: int, config: Config
) -> Callable[[], Mapping[str, Any]]:
    def measured() -> Mapping[str, Any]:
        rows = setting.rows(samples)
        elements = rows * (gemm.fan_in + gemm.fan_out) + 2 * gemm.fan_in * gemm.fan_out
        taken = microseconds(lambda index: _launch(setting, model, gemm, role, samples, config), 2 * elements, setting)
        return {"us": taken, "tflop_s": gemm.flops(rows) / taken / 1e6}

    return measured


def _launch(setting: Setting, model: Size, gemm: Gemm, role: str, samples: int, config: Config) -> Callable[[], object]:
    """The role's launch on operands of its own."""
    operands = Operands(setting, model, gemm, samples)
    with recorded() as launches:
        whole = operands.make(role, config)
    kernel = KERNELS.get((gemm.name, role), "_weight_gradient_kernel" if role == "dw" else "_linear_kernel")
    found = [launch for launch in launches if launch.kernel.fn.__name__ == kernel]
    if not found:
        raise LookupError(f"no launch of {kernel} among {', '.join(launch.kernel.fn.__name__ for launch in launches)}")
    if setting.dry:
        return operands.plain(role)
    for launch in launches:
        _make(launch)

    def run() -> object:
        _make(found[0])
        return whole  # what the launch writes into lives as long as the call

    return run


def _make(launch: Launch) -> None:
    launch.kernel[launch.grid](*launch.args, **launch.options)


class Operands:
    """What a product's op takes; random numbers."""

    def __init__(self, setting: Setting, model: Size, gemm: Gemm, samples: int) -> None:
        self._device = setting.device
        self.model, self.gemm = model, gemm
        self.offsets = setting.layout(samples).expert_offsets
        self.rows = setting.rows(samples)
        self.x = self._drawn(self.rows, gemm.fan_in)
        self.dy = self._drawn(self.rows, gemm.fan_out)
        self.weight = self._weight(gemm.fan_out, gemm.fan_in)

    def _drawn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self._device, dtype=dtype)

    def _weight(self, fan_out: int, fan_in: int) -> Tensor:
        return self._drawn(2, fan_out, fan_in) * fan_in**-0.5

    def make(self, role: str, config: Config) -> Any:
        """Calls the kernels' own function with the config; its results."""
        from beit3_fast.kernels import multiway_ffn, multiway_linear

        if role == "forward" and self.gemm.name in ("fc1", "fc2"):
            defaults = multiway_ffn.default_configs(
                80, torch.bfloat16, self.rows, 2, self.model.width, self.model.hidden
            )
            return multiway_ffn.forward(*self._block(), self.offsets, configs=defaults | {self.gemm.name: config})
        if role == "forward":
            residual = self.dy if self.gemm.name == "out" else None
            bias = self._drawn(2, self.gemm.fan_out)
            return multiway_linear.forward(
                self.x, self.weight, bias, self.offsets, residual=residual, configs={"forward": config}
            )
        if role == "dx" and self.gemm.name == "fc2":
            return self._hidden_gradient(config)
        defaults = multiway_linear.default_configs(
            80, torch.bfloat16, self.rows, 2, self.gemm.fan_in, self.gemm.fan_out
        )
        return multiway_linear.backward(
            *(self.dy, self.x, self.weight, self.offsets),
            needs_x=role == "dx",
            needs_parameters=role == "dw",
            configs=defaults | {"dx" if role == "dx" else "dweight": config},
        )

    def _block(self) -> tuple[Tensor, ...]:
        width, hidden = self.model.width, self.model.hidden
        return (
            *(self._drawn(self.rows, width), self._weight(hidden, width), self._drawn(2, hidden)),
            *(self._drawn(2, hidden), self._drawn(2, hidden), self._weight(width, hidden), self._drawn(2, width)),
        )

    def _hidden_gradient(self, config: Config) -> Any:
        from beit3_fast.kernels import multiway_ffn

        width, hidden, rows = self.model.width, self.model.hidden, self.rows
        x, fc1_weight, _, norm_weight, norm_bias, fc2_weight, _ = self._block()
        mean, rstd = self._drawn(rows, dtype=torch.float32), self._drawn(rows, dtype=torch.float32).abs()
        saved = (self._drawn(rows, hidden), mean, rstd, self._drawn(rows, width))
        folded = self._drawn(2, 2, width, dtype=torch.float32)
        defaults = multiway_ffn.default_configs(80, torch.bfloat16, rows, 2, width, hidden)
        return multiway_ffn.backward(
            *(self._drawn(rows, width), x, fc1_weight, norm_weight, norm_bias, fc2_weight, self.offsets, None),
            *(*saved, folded),
            needs_x=False,
            needs_parameters=False,
            configs=defaults | {"dhidden": config},
        )

    def plain(self, role: str) -> Callable[[], object]:
        """The product's op on whatever device."""
        from beit3_fast import ops

        return lambda: ops.multiway_linear(self.x, self.weight, None, self.offsets)
