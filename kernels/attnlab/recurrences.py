"""Recurrences over time: what a layer keeps of all tokens so far is one matrix a head.

A decode step of attention reads S keys and values; one of these reads and writes a float32 state of
fixed size, whatever the context. Each recurrence is here in three forms, equal but for rounding:

step       one token, the formula as it is written: bound by the memory traffic of the state
reference  the step token by token, in float32. This is the specification
scan       chunks of Q tokens: inside a chunk the recurrence is unrolled into Q × Q products, which
           matrix units do, and only the states at the ends of chunks follow one another

SSD          S ← e^(dt·A)·S + dt·x·Bᵀ          y = S·C      Mamba-2, arXiv:2405.21060
selective    the same with a decay for each channel and state, which no product takes: a scan by
             doubling, h ← a·h + b element by element
gated delta  S ← e^g·S, then S ← S + k·(β·(v − Sᵀk))ᵀ    o = Sᵀq    arXiv:2412.06464

A token whose dt, or whose g and β, are 0 leaves the state as it was: so padding is written.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad

# Shapes.  B batch · T tokens · n chunks of Q tokens · H heads · G groups of heads with one B and C
#          P channels of a head · N state size · K, V widths of a key and a value · C channels

CHUNK = 64
"""Q. Work inside chunks grows with it, steps between them shrink."""


def causal_conv(
    x_BTC: Tensor,
    weight_C1K: Tensor,
    bias_C: Tensor | None,
    state_BCW: Tensor | None,
    real_BT: Tensor | None,
) -> Tensor:
    """Depthwise, [B, T, C]: a token's K inputs are its own and the K − 1 before it.

    `state`: the W ≥ K − 1 inputs before the first token, None: zeros. It is overwritten with the
    last W real ones.
    """
    (C, _, K), x = weight_C1K.shape, x_BTC.transpose(1, 2)
    if state_BCW is None:
        return conv1d(pad(x, (K - 1, 0)), weight_C1K, bias_C, groups=C).transpose(1, 2)
    W = state_BCW.shape[-1]
    inputs = torch.cat((state_BCW.to(x.dtype), x), dim=-1)  # [B, C, W + T]
    if real_BT is None:
        last = inputs[..., -W:]
    else:
        places = real_BT.sum(dim=1)[:, None] + torch.arange(W, device=x.device)
        last = inputs.gather(2, places[:, None].expand(-1, C, -1))
    state_BCW.copy_(last.detach())
    return conv1d(inputs[..., W - K + 1 :], weight_C1K, bias_C, groups=C).transpose(1, 2)


def ssd_step(
    A_H: Tensor, x_BHP: Tensor, dt_BH: Tensor, B_BGN: Tensor, C_BGN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: y [B, H, P] and the new state, float32."""
    A, x, dt, B, C = (t.float() for t in (A_H, x_BHP, dt_BH, B_BGN, C_BGN))
    shared = x.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(shared, dim=1), C.repeat_interleave(shared, dim=1)
    decay = (dt * A).exp()[..., None, None]
    state = decay * state_BHPN + (dt[..., None] * x)[..., None] * B[:, :, None]
    return (state * C[:, :, None]).sum(-1), state


def ssd_reference(
    A_H: Tensor, x_BTHP: Tensor, dt_BTH: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, P] and the state behind the last token, token by token."""
    return _token_by_token(partial(ssd_step, A_H), x_BTHP, dt_BTH, B_BTGN, C_BTGN, state_BHPN)


def ssd_scan(
    A_H: Tensor,
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    state_BHPN: Tensor,
    *,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """As `ssd_reference`, chunk by chunk."""
    T, H, G = x_BTHP.shape[1], x_BTHP.shape[2], B_BTGN.shape[2]
    with _without_autocast(x_BTHP):
        dt = dt_BTH.float()
        x = _in_chunks(x_BTHP.float() * dt[..., None], chunk)  # [B, n, H, Q, P]
        log = _in_chunks((dt * A_H.float())[..., None], chunk).cumsum(-2)  # [B, n, H, Q, 1]
        B, C = _in_chunks(B_BTGN.float(), chunk), _in_chunks(C_BTGN.float(), chunk)
        scores = (C @ B.mT).repeat_interleave(H // G, dim=2)  # [B, n, H, Q, Q]
        inside = (scores * _decays(log)[..., 0]) @ x
        del scores
        left = x * (log[..., -1:, :] - log).exp()  # of each token at its chunk's end
        added = torch.einsum("bngrqp,bngqs->bngrps", left.unflatten(2, (G, -1)), B).flatten(2, 3)
        kept, starts, state = log[..., -1:, :].exp(), [], state_BHPN
        for i in range(x.shape[1]):
            starts.append(state)
            state = kept[:, i] * state + added[:, i]
        start = torch.stack(starts, dim=1).unflatten(2, (G, -1))  # [B, n, G, H/G, P, N]
        before = torch.einsum("bngqs,bngrps->bngrqp", C, start).flatten(2, 3) * log.exp()
        return _from_chunks(inside + before, T), state


def gated_delta_step(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, g_BHK: Tensor, beta_BH: Tensor, state_BHKV: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: o [B, H, V] and the new state, float32.

    g: the logarithm of the decay, of each channel of the key or, [B, H, 1], of the head.
    """
    q, k, v, g, beta = (t.float() for t in (q_BHK, k_BHK, v_BHV, g_BHK, beta_BH))
    state = g.exp()[..., None] * state_BHKV
    recalled = (state * k[..., None]).sum(-2)  # Sᵀk [B, H, V]
    delta = beta[..., None] * (v - recalled)
    state = state + k[..., None] * delta[..., None, :]
    return (state * q[..., None]).sum(-2), state


def gated_delta_reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the state behind the last token, token by token."""
    inputs = (q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH, state_BHKV)
    return _token_by_token(gated_delta_step, *inputs)


def gated_delta_scan(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor,
    *,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """As `gated_delta_reference`, chunk by chunk.

    A chunk's corrections δ = β·(v − Sᵀk) depend on those before them: a unit triangular system,
    solved once for what the values give and once for what the state at the chunk's start takes.
    """
    T, V = q_BTHK.shape[1], v_BTHV.shape[-1]
    with _without_autocast(q_BTHK):
        q, k, v, g, beta = (
            _in_chunks(t.float(), chunk)
            for t in (q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH[..., None])
        )
        log = g.cumsum(-2)  # [B, n, H, Q, K or 1]
        decays = _decays(log)  # [B, n, H, Q, Q, K or 1]
        system = _scores(beta * k, k, decays)  # its diagonal is not read: ones
        given = torch.cat((beta * v, beta * k * log.exp()), dim=-1)
        solved = torch.linalg.solve_triangular(system, given, upper=False, unitriangular=True)
        from_values, from_state = solved.split([V, solved.shape[-1] - V], dim=-1)
        inside = _scores(q, k, decays)
        del decays, system, given
        q, k = q * log.exp(), k * (log[..., -1:, :] - log).exp()
        kept, out, state = log[..., -1, :].exp()[..., None], [], state_BHKV
        for i in range(q.shape[1]):
            delta = from_values[:, i] - from_state[:, i] @ state  # [B, H, Q, V]
            out.append(q[:, i] @ state + inside[:, i] @ delta)
            state = kept[:, i] * state + k[:, i].mT @ delta
        return _from_chunks(torch.stack(out, dim=1), T), state


def selective_step(
    A_CN: Tensor, x_BC: Tensor, dt_BC: Tensor, B_BN: Tensor, C_BN: Tensor, state_BCN: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: y [B, C] and the new state, float32. Mamba, arXiv:2312.00752."""
    A, x, dt, B, C = (t.float() for t in (A_CN, x_BC, dt_BC, B_BN, C_BN))
    state = (dt[..., None] * A).exp() * state_BCN + (dt * x)[..., None] * B[:, None]
    return (state * C[:, None]).sum(-1), state


def selective_reference(
    A_CN: Tensor, x_BTC: Tensor, dt_BTC: Tensor, B_BTN: Tensor, C_BTN: Tensor, state_BCN: Tensor
) -> tuple[Tensor, Tensor]:
    """y [B, T, C] and the state behind the last token, token by token."""
    return _token_by_token(partial(selective_step, A_CN), x_BTC, dt_BTC, B_BTN, C_BTN, state_BCN)


def selective_scan(
    A_CN: Tensor,
    x_BTC: Tensor,
    dt_BTC: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    state_BCN: Tensor,
    *,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """As `selective_reference`; the states of one chunk, [B, Q, C, N], exist at a time."""
    out, state = [], state_BCN
    inputs = (t.float().split(chunk, dim=1) for t in (x_BTC, dt_BTC, B_BTN, C_BTN))
    for x, dt, B, C in zip(*inputs, strict=True):
        decay = (dt[..., None] * A_CN.float()).exp()
        states = linear_scan(decay, (dt * x)[..., None] * B[:, :, None], state)
        out.append((states * C[:, :, None]).sum(-1))
        state = states[:, -1]
    return torch.cat(out, dim=1), state


def linear_scan(a_BT: Tensor, b_BT: Tensor, state_B: Tensor) -> Tensor:
    """h_t = a_t·h_{t−1} + b_t element by element, [B, T, ...], in log₂ T passes of doubling."""
    a, b, reach = a_BT, b_BT, 1
    while reach < a.shape[1]:
        b = torch.cat((b[:, :reach], b[:, reach:] + a[:, reach:] * b[:, :-reach]), dim=1)
        a = torch.cat((a[:, :reach], a[:, reach:] * a[:, :-reach]), dim=1)
        reach *= 2
    return b + a * state_B[:, None]


def _token_by_token(
    step: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """`step` over the tokens of all inputs but the last, which is the state before them."""
    out, state = [], inputs[-1]
    for token in zip(*(t.unbind(1) for t in inputs[:-1]), strict=True):
        y, state = step(*token, state)
        out.append(y)
    return torch.stack(out, dim=1), state


def _in_chunks(x_BTH: Tensor, chunk: int) -> Tensor:
    """[B, T, H, ...] → [B, n, H, Q, ...]; zeros fill the last chunk up, and change no state."""
    T = x_BTH.shape[1]
    Q = min(chunk, T)
    filled = pad(x_BTH, (0, 0) * (x_BTH.dim() - 2) + (0, -T % Q)) if T % Q else x_BTH
    return filled.unflatten(1, (-1, Q)).transpose(2, 3)


def _from_chunks(x_BnHQ: Tensor, T: int) -> Tensor:
    """[B, n, H, Q, ...] → [B, T, H, ...]."""
    return x_BnHQ.transpose(2, 3).flatten(1, 2)[:, :T]


def _decays(log: Tensor) -> Tensor:
    """What is left at token i of what came at token j, [..., i, j, K]; 0 for the later ones.

    From the logarithms since the chunk's start, [..., Q, K]; no ratio is above 1.
    """
    Q = log.shape[-2]
    later = torch.ones(Q, Q, dtype=torch.bool, device=log.device).triu(1)
    gap = log[..., :, None, :] - log[..., None, :, :]
    return gap.masked_fill(later[..., None], -torch.inf).exp()


def _scores(a: Tensor, k: Tensor, decays: Tensor) -> Tensor:
    """a_i · k_j, decayed from j to i: [..., Q, Q]."""
    if decays.shape[-1] == 1:
        return (a @ k.mT) * decays[..., 0]
    return torch.einsum("...ic,...jc,...ijc->...ij", a, k, decays)


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """States are summed in float32, whatever products autocast would round."""
    if x.device.type == "meta":
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
