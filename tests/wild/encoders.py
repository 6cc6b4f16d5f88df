"""Small encoders of the formats that others quantise in: a matrix to the parts in the file, and what they mean.

Each takes `[out, in]` in fp32 and returns the parts by their name behind the module, and the decoded values.
"""

from __future__ import annotations

import json

import numpy as np
import torch


def words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Codes `[rows, n]` as a stream of bits, in int32 words."""
    stream = (codes[..., None] >> np.arange(bits) & 1).reshape(len(codes), -1).astype(np.uint8)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view(np.int32).copy())


def per_column(grid: torch.Tensor, columns: int, group: int) -> torch.Tensor:
    return grid.repeat_interleave(group, dim=1)[:, :columns]


def groups_of(w: torch.Tensor, group: int) -> torch.Tensor:
    """The largest absolute value of each group of columns `[rows, groups]`; the last one may be smaller."""
    padded = torch.nn.functional.pad(w, (0, -w.shape[1] % group))
    return padded.view(len(w), -1, group).abs().amax(-1).clamp_min(1e-8)


def fp8(w: torch.Tensor, *, block=None, name="weight_scale_inv", shape=None, dtype=torch.float32):
    rows, columns = w.shape
    down, across = block or (rows, columns)
    padded = torch.nn.functional.pad(w, (0, -columns % across, 0, -rows % down))
    tiles = padded.view(padded.shape[0] // down, down, -1, across)
    scales = (tiles.abs().amax((1, 3)).clamp_min(1e-8) / 448).to(dtype)
    spread = scales.float().repeat_interleave(down, 0).repeat_interleave(across, 1)[:rows, :columns]
    codes = (w / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    stored = scales if shape is None else scales.reshape(shape)
    return {"weight": codes, name: stored}, codes.float() * spread


def int8_channels(w: torch.Tensor, *, zeros=False, group=None):
    group = group or w.shape[1]
    scales = groups_of(w, group) / 120
    zero = torch.randint(-5, 6, scales.shape).to(torch.int8) if zeros else torch.zeros(scales.shape, dtype=torch.int8)
    s, z = (per_column(x.float(), w.shape[1], group) for x in (scales, zero))
    codes = (w / s + z).round().clamp(-128, 127).to(torch.int8)
    parts = {"weight": codes, "weight_scale": scales} | ({"weight_zero_point": zero} if zeros else {})
    return parts, (codes.float() - z) * s


def packed(w: torch.Tensor, *, bits=4, group=32, zeros=False, order=False):
    half = 1 << bits - 1
    index = torch.arange(w.shape[1]) // group
    if order:
        index = index[torch.randperm(w.shape[1])]
    n_groups = int(index.max()) + 1
    scales = torch.stack([w[:, index == g].abs().amax(1) for g in range(n_groups)], 1).clamp_min(1e-8) / (half - 1)
    zero = torch.randint(-3, 4, scales.shape) if zeros else torch.zeros(scales.shape, dtype=torch.int64)
    s, z = scales[:, index], zero[:, index]
    codes = (w / s + z).round().clamp(-half, half - 1)
    parts = {
        "weight_packed": words((codes.long() + half).numpy(), bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(w.shape),
    }
    if zeros:
        parts["weight_zero_point"] = words((zero.T + half).numpy(), bits).T.contiguous()
    if order:
        parts["weight_g_idx"] = index.int()
    return parts, (codes - z) * s


def bnb8(w: torch.Tensor):
    largest = w.abs().amax(1)
    codes = (w * 127 / largest[:, None]).round().to(torch.int8)
    parts = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, codes.float() * (largest[:, None] / 127)


def bnb4(w: torch.Tensor, *, kind="nf4", block=64, nested=False):
    meaning = torch.linspace(-1, 1, 16).sign() * torch.linspace(-1, 1, 16).abs() ** 1.3  # any table will do
    flat = torch.nn.functional.pad(w.flatten(), (0, -w.numel() % block)).view(-1, block)
    absmax = flat.abs().amax(1).clamp_min(1e-8)
    state = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": list(w.shape)}
    parts = {"weight.quant_map": meaning}
    if nested:
        table = torch.linspace(-1, 1, 256)
        offset = float(absmax.mean())
        outer = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        largest = outer.abs().amax(1).clamp_min(1e-8)
        codes8 = (outer / largest[:, None] * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        decoded = (table[codes8.int()] * largest[:, None]).flatten()[: len(absmax)] + offset
        parts |= {
            "weight.absmax": codes8.flatten()[: len(absmax)].clone(),
            "weight.nested_absmax": largest,
            "weight.nested_quant_map": table,
        }
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        decoded = absmax
        parts["weight.absmax"] = absmax
    codes = ((flat / absmax[:, None]).flatten()[: w.numel(), None] - meaning).abs().argmin(1)
    spread = decoded.repeat_interleave(block)[: w.numel()]
    both = torch.nn.functional.pad(codes, (0, w.numel() % 2)).view(-1, 2)
    parts["weight"] = (both[:, 0] << 4 | both[:, 1]).to(torch.uint8)[:, None]
    text = json.dumps(state).encode()
    parts[f"weight.quant_state.bitsandbytes__{kind}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return parts, (meaning[codes] * spread).view(w.shape)


def gptq(w: torch.Tensor, *, bits=4, group=32, order=False, version=1, index=True):
    most = (1 << bits) - 1
    groups = torch.arange(w.shape[1]) // group
    if order:
        groups = groups[torch.randperm(w.shape[1])]
    n_groups = int(groups.max()) + 1
    scales = torch.stack([w[:, groups == g].abs().amax(1) for g in range(n_groups)], 1).clamp_min(1e-6)
    scales = (scales / (most / 2)).half()
    zero = torch.randint(1, most + 1, scales.shape)
    s, z = scales.float()[:, groups], zero[:, groups]
    codes = (w / s + z).round().clamp(0, most).long()
    parts = {
        "qweight": words(codes.numpy(), bits).T.contiguous(),
        "qzeros": words((zero.T - (1 if version == 1 else 0)).numpy(), bits),
        "scales": scales.T.contiguous(),
    }
    if index or order:
        parts["g_idx"] = groups.int()
    return parts, (codes - z) * s


def awq(w: torch.Tensor, *, group=32):
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # the column that each place in a word holds

    def shuffled(codes: torch.Tensor) -> torch.Tensor:
        return words(codes.view(len(codes), -1, 8)[..., order].reshape(len(codes), -1).numpy(), 4)

    scales = (groups_of(w, group) / 7).half()
    zero = torch.randint(4, 12, scales.shape)
    s, z = (per_column(x, w.shape[1], group) for x in (scales.float(), zero))
    codes = (w / s + z).round().clamp(0, 15).long()
    parts = {"qweight": shuffled(codes.T.contiguous()), "qzeros": shuffled(zero.T.contiguous()), "scales": scales.T}
    return {name: part.contiguous() for name, part in parts.items()}, (codes - z) * s
