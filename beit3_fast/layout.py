"""Where each token's row is.

All tokens of a batch live in one buffer, in *expert order*, from the embedding to the head::

    rows 0 .. Nv-1    every vision token of every sample, sample after sample
    rows Nv .. N-1    every valid text token of every sample, sample after sample (padding is gone)

so that the expert of a token follows from its row number alone, and a per-token operation needs no mask, no index, no
split and no concatenation. Attention sees one virtual sequence per sample,
``row(i) = vision_start + i if i < vision_len else text_start + (i - vision_len)``.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def _to_device(host: Tensor, device: torch.device) -> Tensor:
    # A pinned source makes the copy asynchronous: the host never waits for the device's queue to drain. A subclass
    # (a fake tensor) has no memory to pin.
    if device.type == "cuda" and host.device.type == "cpu" and type(host) is Tensor:
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def _is_recorded(device: torch.device) -> bool:
    """Whether what runs now is recorded, to be run again: by torch.compile or export, or in a CUDA graph.

    A copy from the host must not be part of such a recording: pinned memory cannot be traced, the memory that a
    captured copy reads may be given to somebody else, and a tensor on the CPU keeps Inductor from using CUDA graphs.
    """
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def host_lengths(name: str, lengths: Sequence[int] | Tensor, batch_size: int | None = None) -> list[int]:
    """Lengths as a list of ints >= 0, one per sample.

    Raises:
        TypeError, ValueError: not ints, negative, of another count, or on a device; ``name`` is in the message.
    """
    if isinstance(lengths, Tensor):
        if lengths.device.type != "cpu":
            raise ValueError(
                f"{name} must be known on the host (a sequence of ints or a CPU tensor), got a tensor on "
                f"{lengths.device}; a padding mask on the device goes to TokenLayout.from_padding"
            )
        if lengths.ndim != 1:
            raise ValueError(f"{name} must be one-dimensional, got shape {tuple(lengths.shape)}")
        lengths = lengths.tolist()
    try:
        values = [operator.index(length) for length in lengths]
    except TypeError:
        raise TypeError(f"{name} must be a sequence of ints, one per sample, got {lengths!r}") from None
    if any(length < 0 for length in values):
        raise ValueError(f"{name} must not be negative, got {values}")
    if batch_size is not None and len(values) != batch_size:
        raise ValueError(f"{name} must have one entry per sample ({batch_size}), got {len(values)}")
    return values


def _width(name: str, width: int | None, lengths: list[int]) -> int:
    longest = max(lengths, default=0)
    if width is None:
        return longest
    if not isinstance(width, int):
        raise TypeError(f"{name} must be an int, got {width!r}")
    if width < longest:
        raise ValueError(f"{name} must be at least the longest length ({longest}), got {width}")
    return width


class ExpertRows(NamedTuple):
    """Which rows belong to which expert.

    Attributes:
        offsets: int32 (E + 1,) on the rows' device; row r belongs to expert e iff ``offsets[e] <= r < offsets[e + 1]``.
        bounds: the same numbers on the host, so that nobody has to wait for the device to learn a size. Where only the
            device knows how many rows are in use, the last ones are the most that they can be.
    """

    offsets: Tensor
    bounds: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Row numbers of a batch of two-part (vision, text) sequences in expert order. Built once a forward.

    Attributes:
        batch_size: number of samples B.
        num_rows: rows of the buffer. Equal to the token count when lengths are known on the host, an upper bound
            (every text column) when only the device knows them: rows at or past ``expert_offsets[-1]`` are then unused.
        num_vision_rows: vision tokens of all samples, Nv; always known on the host.
        vision_width, text_width: columns of the padded (B, S) form, S = vision_width + text_width.
        expert_offsets: int32 (3,) ``[0, Nv, N]``; row r belongs to expert e iff ``offsets[e] <= r < offsets[e + 1]``.
        segments: int32 (B, 4), per sample ``vision_start, vision_len, text_start, text_len``.
        vision_lengths: tokens per sample, on the host.
        text_lengths: tokens per sample on the host, or None when only the device knows them.
        vision_source, text_source: int64; for each vision (text) row its index in the flattened (B, vision_width)
            ((B, text_width)) columns. None stands for the identity: no sample is padded.
    """

    batch_size: int
    num_rows: int
    num_vision_rows: int
    vision_width: int
    text_width: int
    expert_offsets: Tensor
    segments: Tensor
    vision_lengths: tuple[int, ...]
    text_lengths: tuple[int, ...] | None
    vision_source: Tensor | None
    text_source: Tensor | None

    @staticmethod
    def from_lengths(
        vision_lengths: Sequence[int] | Tensor,
        text_lengths: Sequence[int] | Tensor,
        *,
        vision_width: int | None = None,
        text_width: int | None = None,
        device: torch.device | str = "cpu",
    ) -> TokenLayout:
        """Layout of samples whose lengths are known on the host; text is padded on the right.

        Args:
            vision_lengths, text_lengths: one int >= 0 per sample (a sequence or a CPU tensor).
            vision_width, text_width: columns of the padded form; the longest length by default.
            device: where the row tensors go. Nothing waits for the device.

        Raises:
            ValueError: empty batch, negative lengths, unequal counts, a width below the longest length, lengths on a
                GPU.
        """
        vision = host_lengths("vision_lengths", vision_lengths)
        text = host_lengths("text_lengths", text_lengths, len(vision))
        if not vision:
            raise ValueError("vision_lengths and text_lengths describe an empty batch; at least one sample is needed")
        vision_width = _width("vision_width", vision_width, vision)
        text_width = _width("text_width", text_width, text)
        device = torch.device(device)
        return _host_layout(
            vision,
            text,
            vision_width,
            text_width,
            _right_padded_source(vision, vision_width, device),
            _right_padded_source(text, text_width, device),
            device,
        )

    @staticmethod
    def from_padding(
        text_padding: Tensor, *, vision_tokens: int = 0, device: torch.device | str | None = None
    ) -> TokenLayout:
        """Layout of ``vision_tokens`` vision tokens per sample and the text tokens that a padding mask leaves.

        Any pattern of padding is handled: valid tokens keep their order and their column. A mask on the CPU is read
        there and gives exact sizes. A mask on a GPU (or inside torch.compile) is never waited for: offsets stay on the
        device and the buffer has room for every column.

        Args:
            text_padding: (B, T) bool or integer, 1/True = padding (the public code's polarity).
            vision_tokens: vision tokens of every sample, 0 for text alone.
            device: where the row tensors go; the mask's device by default.

        Raises:
            TypeError: text_padding is not a bool or integer tensor.
            ValueError: text_padding is not 2-D, or the batch is empty.
        """
        if not isinstance(text_padding, Tensor) or text_padding.is_floating_point() or text_padding.is_complex():
            got = text_padding.dtype if isinstance(text_padding, Tensor) else type(text_padding).__name__
            raise TypeError(f"text_padding must be a bool or integer tensor (1 = padding), got {got}")
        if not isinstance(vision_tokens, int):
            raise TypeError(f"vision_tokens must be an int, got {vision_tokens!r}")
        if vision_tokens < 0:
            raise ValueError(f"vision_tokens must not be negative, got {vision_tokens}")
        if text_padding.ndim != 2 or text_padding.shape[0] == 0:
            raise ValueError(
                f"text_padding must have shape (batch, tokens), batch > 0; got {tuple(text_padding.shape)}"
            )
        batch_size, text_width = text_padding.shape
        valid = text_padding == 0
        if valid.device.type == "cpu" and not torch.compiler.is_compiling():
            dense = bool(valid.all())
            return _host_layout(
                [vision_tokens] * batch_size,
                [text_width] * batch_size if dense else valid.sum(1).tolist(),
                vision_tokens,
                text_width,
                None,
                None if dense else valid.flatten().nonzero().flatten(),
                torch.device(device or "cpu"),
            )
        return _device_layout(valid if device is None else valid.to(device), vision_tokens)

    @property
    def device(self) -> torch.device:
        return self.expert_offsets.device

    @property
    def width(self) -> int:
        """Columns of the padded (B, S) form; no sample's virtual sequence is longer."""
        return self.vision_width + self.text_width

    @property
    def num_text_rows(self) -> int:
        return self.num_rows - self.num_vision_rows

    @property
    def vision_start(self) -> Tensor:
        return self.segments[:, 0]

    @property
    def vision_len(self) -> Tensor:
        return self.segments[:, 1]

    @property
    def text_start(self) -> Tensor:
        return self.segments[:, 2]

    @property
    def text_len(self) -> Tensor:
        return self.segments[:, 3]

    def parts(self, rows: int) -> list[TokenLayout]:
        """Layouts of consecutive samples, about ``rows`` rows of whole samples each. ``[self]`` where one part holds
        all, or where lengths are known to the device alone.

        Raises:
            ValueError: rows below 1.
        """
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        count = min(round(self.num_rows / rows), self.batch_size)
        if count <= 1 or self.text_lengths is None:
            return [self]
        bounds = [self.batch_size * i // count for i in range(count + 1)]
        return [self._samples(first, last) for first, last in itertools.pairwise(bounds)]

    def _samples(self, first: int, last: int) -> TokenLayout:
        assert self.text_lengths is not None
        vision, text = self.vision_lengths, self.text_lengths

        def source(of: Tensor | None, lengths: tuple[int, ...], width: int) -> Tensor | None:
            return None if of is None else of[sum(lengths[:first]) : sum(lengths[:last])] - first * width

        return _host_layout(
            list(vision[first:last]),
            list(text[first:last]),
            self.vision_width,
            self.text_width,
            source(self.vision_source, vision, self.vision_width),
            source(self.text_source, text, self.text_width),
            self.device,
        )

    @property
    def shared_offsets(self) -> Tensor:
        """int32 (2,) ``[0, N]``: one expert serves every token."""
        return self.expert_offsets[::2].contiguous()

    @property
    def fused_offsets(self) -> Tensor:
        """int32 (4,) for three experts (vision, language, vision-language): an image-text batch goes to the third as a
        whole, a batch of one modality stays with its own expert (BEiT-3 paper, section 2.1)."""
        if self.vision_width and self.text_width:
            return torch.cat([self.expert_offsets[:1].expand(3), self.expert_offsets[2:]])
        return torch.cat([self.expert_offsets, self.expert_offsets[-1:]])

    def experts(self, num_experts: int) -> ExpertRows:
        """The rows of each of one (:attr:`shared_offsets`), two (:attr:`expert_offsets`) or three experts
        (:attr:`fused_offsets`).

        Raises:
            ValueError: another number of experts.
        """
        if num_experts == 1:
            return ExpertRows(self.shared_offsets, (0, self.num_rows))
        if num_experts == 2:
            return ExpertRows(self.expert_offsets, (0, self.num_vision_rows, self.num_rows))
        if num_experts == 3:
            fused = self.vision_width and self.text_width
            bounds = (0, 0, 0) if fused else (0, self.num_vision_rows, self.num_rows)
            return ExpertRows(self.fused_offsets, (*bounds, self.num_rows))
        raise ValueError(f"num_experts must be 1, 2 or 3, got {num_experts}")

    @property
    def row_sample(self) -> Tensor:
        """int64 (num_rows,): the sample that each row belongs to."""
        return torch.cat(
            [
                self._source(self.vision_source, self.vision_width) // max(self.vision_width, 1),
                self._source(self.text_source, self.text_width) // max(self.text_width, 1),
            ]
        )

    @property
    def text_column(self) -> Tensor:
        """int64 (num_text_rows,): the column of each text row in the padded (B, text_width) form."""
        return self._source(self.text_source, self.text_width) % max(self.text_width, 1)

    def _source(self, source: Tensor | None, width: int) -> Tensor:
        return torch.arange(self.batch_size * width, device=self.device) if source is None else source

    def pack_text(self, columns: Tensor) -> Tensor:
        """(B, text_width, ...) -> (num_text_rows, ...): the text part of :meth:`pack`, e.g. for token ids.

        Raises:
            ValueError: columns does not start with (batch_size, text_width).
        """
        if columns.shape[:2] != (self.batch_size, self.text_width):
            raise ValueError(
                f"columns must have shape ({self.batch_size}, {self.text_width}, ...), got {tuple(columns.shape)}"
            )
        flat = columns.flatten(0, 1)
        return flat if self.text_source is None else flat.index_select(0, self.text_source)

    def pack(self, dense: Tensor) -> Tensor:
        """(B, S, ...) -> (num_rows, ...), S = vision_width + text_width: rows in expert order, padding gone.

        Raises:
            ValueError: dense does not start with (batch_size, width).
        """
        if dense.shape[:2] != (self.batch_size, self.width):
            raise ValueError(f"dense must have shape ({self.batch_size}, {self.width}, ...), got {tuple(dense.shape)}")
        vision = dense[:, : self.vision_width].flatten(0, 1)
        if self.vision_source is not None:
            vision = vision.index_select(0, self.vision_source)
        return torch.cat([vision, self.pack_text(dense[:, self.vision_width :])])

    def unpack(self, rows: Tensor) -> Tensor:
        """(num_rows, ...) -> (B, S, ...), the inverse of :meth:`pack`; padded positions are zeros.

        Raises:
            ValueError: rows does not start with num_rows.
        """
        if rows.ndim == 0 or rows.shape[0] != self.num_rows:
            raise ValueError(f"rows must have {self.num_rows} rows, got {tuple(rows.shape)}")
        vision, text = rows.split([self.num_vision_rows, self.num_text_rows])
        if self.text_lengths is None:  # rows past the last offset are unused: they must not reach the output
            used = torch.arange(self.num_vision_rows, self.num_rows, device=rows.device) < self.expert_offsets[-1]
            text = torch.where(used.view(-1, *[1] * (rows.ndim - 1)), text, 0)
        return torch.cat(
            [
                self._scatter(vision, self.vision_source, self.vision_width),
                self._scatter(text, self.text_source, self.text_width),
            ],
            dim=1,
        )

    def _scatter(self, rows: Tensor, source: Tensor | None, width: int) -> Tensor:
        if source is not None:
            flat = rows.new_zeros(self.batch_size * width, *rows.shape[1:])
            rows = flat.index_copy(0, source, rows)
        return rows.view(self.batch_size, width, *rows.shape[1:])


def _right_padded_source(lengths: list[int], width: int, device: torch.device) -> Tensor | None:
    if all(length == width for length in lengths):
        return None
    place = device if _is_recorded(device) else "cpu"
    # a range per sample rather than nonzero() of a mask: torch.compile then knows the size
    return torch.cat([torch.arange(i * width, i * width + length, device=place) for i, length in enumerate(lengths)])


def _host_layout(
    vision: list[int],
    text: list[int],
    vision_width: int,
    text_width: int,
    vision_source: Tensor | None,
    text_source: Tensor | None,
    device: torch.device,
) -> TokenLayout:
    vision_rows, num_rows = sum(vision), sum(vision) + sum(text)
    if _is_recorded(device):
        expert_offsets, segments = _places(_lengths_on(device, vision), _lengths_on(device, text), vision_rows)
    else:
        starts = zip(itertools.accumulate([0, *vision]), itertools.accumulate([vision_rows, *text]), strict=True)
        table = [(v, v_len, t, t_len) for (v, t), v_len, t_len in zip(starts, vision, text, strict=False)]
        # One copy for both; the fourth number makes the segments begin at 16 bytes, as kernels like it.
        numbers = [0, vision_rows, num_rows, 0, *itertools.chain.from_iterable(table)]
        on_device = _to_device(torch.tensor(numbers, dtype=torch.int32, device="cpu"), device)
        expert_offsets, segments = on_device[:3], on_device[4:].view(-1, 4)
    return TokenLayout(
        batch_size=len(vision),
        num_rows=num_rows,
        num_vision_rows=vision_rows,
        vision_width=vision_width,
        text_width=text_width,
        expert_offsets=expert_offsets,
        segments=segments,
        vision_lengths=tuple(vision),
        text_lengths=tuple(text),
        vision_source=None if vision_source is None else _to_device(vision_source, device),
        text_source=None if text_source is None else _to_device(text_source, device),
    )


def _lengths_on(device: torch.device, lengths: list[int]) -> Tensor:
    """int64 (B,), made on the device."""
    if len(set(lengths)) == 1:
        return torch.full((len(lengths),), lengths[0], dtype=torch.int64, device=device)
    return torch.cat([torch.full((1,), length, dtype=torch.int64, device=device) for length in lengths])


def _places(vision_len: Tensor, text_len: Tensor, vision_rows: int) -> tuple[Tensor, Tensor]:
    """``expert_offsets`` and ``segments`` of samples with so many tokens (B,), computed where the lengths are."""
    vision_end, text_end = vision_len.cumsum(0), vision_rows + text_len.cumsum(0)
    zero = text_end.new_zeros(1)
    expert_offsets = torch.cat([zero, zero + vision_rows, text_end[-1:]]).int()
    segments = torch.stack([vision_end - vision_len, vision_len, text_end - text_len, text_len], dim=1).int()
    return expert_offsets, segments


def _device_layout(valid: Tensor, vision_tokens: int) -> TokenLayout:
    """Of a (B, T) mask whose values only the device knows: every size is one the host knows without asking."""
    batch_size, text_width = valid.shape
    vision_rows = batch_size * vision_tokens
    text_len = valid.sum(1)
    expert_offsets, segments = _places(torch.full_like(text_len, vision_tokens), text_len, vision_rows)
    return TokenLayout(
        batch_size=batch_size,
        num_rows=vision_rows + batch_size * text_width,
        num_vision_rows=vision_rows,
        vision_width=vision_tokens,
        text_width=text_width,
        expert_offsets=expert_offsets,
        segments=segments,
        vision_lengths=(vision_tokens,) * batch_size,
        text_lengths=None,
        vision_source=None,
        # A stable sort moves the valid columns to the front in their order.
        text_source=torch.sort(valid.flatten().logical_not(), stable=True).indices,
    )
