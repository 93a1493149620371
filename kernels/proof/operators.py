"""The public operators, each with small inputs, its gradients and its definition: for what holds of all of them alike.

A kernel family's cases (kernels/proof/families) hold its launchers to float64 at the sizes that its tiles have. Here
stands the other side: whatever a caller hands to a public function is computed right or refused by name. The checks
take an `Operator`, so that a new operator has all of them with one entry in OPERATORS:

    check_values      every implementation against the definition in float64, with every gradient
    check_layout      arguments and upstream gradients of every LAYOUT give what dense ones give
    check_nan         a NaN in any argument reaches every result that it reaches in the definition
    check_refusals    arguments on another device, of another shape or dtype, are errors that name the argument
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch

from kernels.proof.near import compare

Given = dict[str, Any]


class Operator(NamedTuple):
    """A public function. `inputs` draws its arguments, floats in float32, and for each output that is differentiated
    an upstream gradient under the name "upstream_<output>".

    run: (module, inputs, impl) -> outputs by name; may change what is named in `changed`.
    reference: (module, inputs) -> the same, in plain torch and any dtype.
    leaves: the arguments that are differentiated. changed: those that are updated in place; both give outputs.
    """

    name: str
    module: str
    inputs: Callable[[torch.Generator], Given]
    run: Callable[[ModuleType, Given, str], dict[str, torch.Tensor]]
    reference: Callable[[ModuleType, Given], dict[str, torch.Tensor]]
    leaves: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    implementations: tuple[str, ...] = ("auto", "triton")
    hostile: tuple[str, ...] | None = None  # names that may have any layout; None: all tensors
    half: bool = True  # runs in half precision too


# ---- layouts -----------------------------------------------------------------------------------------------


def _transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _sliced(x):
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), 77)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def _strided(x):
    return torch.stack((x, torch.full_like(x, 77)), -1).flatten(-2)[..., ::2]


def _rows_apart(x):
    wide = x.new_full((x.shape[0], 2, *x.shape[1:]), 77)
    wide[:, 1] = x
    return wide[:, 1]


def _offset(x):
    room = x.new_full((x.numel() + 1,), 77)
    return room[1:].view(x.shape).copy_(x)


def _negative(x):
    return torch._neg_view(-x) if x.is_floating_point() else x


def _expanded(x):
    return x[:1].clone().expand(x.shape) if x.ndim else x


#: Ways to lie in memory. Each keeps its argument's values, but "expanded", which repeats the first along axis 0.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": _transposed,
    "sliced": _sliced,
    "strided": _strided,
    "rows apart": _rows_apart,
    "offset": _offset,
    "negative": _negative,
    "expanded": _expanded,
}


def every_tensor(value: Any, name: str = "") -> Iterator[str]:
    """Names of the tensors in nested inputs: "x", "plan.first_key_BT", "grads.0"."""
    if isinstance(value, torch.Tensor):
        if value.ndim and value.numel():
            yield name
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from every_tensor(part, f"{name}.{key}" if name else key)
    elif isinstance(value, (list, tuple)):
        for key, part in zip(getattr(value, "_fields", range(len(value))), value):
            yield from every_tensor(part, f"{name}.{key}")


def floating_tensors(given: Given) -> list[str]:
    """Names of the inputs that hold numbers; a plan's mask is none of them."""
    kinds: dict[str, bool] = {}
    mapped(given, lambda name, x: kinds.update({name: x.is_floating_point()}))
    return [name for name in every_tensor(given) if kinds[name] and not name.startswith("plan")]


def mapped(value: Any, change: Callable[[str, torch.Tensor], torch.Tensor], name: str = "") -> Any:
    """Nested inputs with every tensor replaced by change(its name, itself)."""
    if isinstance(value, torch.Tensor):
        return change(name, value)
    if isinstance(value, dict):
        return {k: mapped(v, change, f"{name}.{k}" if name else k) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        keys = getattr(value, "_fields", range(len(value)))
        parts = [mapped(v, change, f"{name}.{k}") for k, v in zip(keys, value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def laid_out(given: Any, layout: str, only: str | None = None) -> tuple[Any, Any]:
    """(inputs of which all tensors, or the one named `only`, lie as `layout` says; dense ones of the same values)."""

    def change(name, x):
        return LAYOUTS[layout](x) if only in (None, name) and x.ndim and x.numel() else x

    hostile = mapped(given, change)
    return hostile, mapped(hostile, lambda _, x: x.resolve_neg().clone(memory_format=torch.contiguous_format))


def moved(x: torch.Tensor, device: str) -> torch.Tensor:
    """x on that device, with its strides, offset and gaps, which torch's own copy between devices may straighten."""
    if x.device.type == torch.device(device).type:
        return x
    if x.is_neg():
        return torch._neg_view(moved(torch._neg_view(x), device))
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device).untyped_storage()
    there = torch.empty(0, dtype=x.dtype, device=device)
    return there.set_(storage, x.storage_offset(), x.shape, x.stride())


def same_layout(x: torch.Tensor) -> torch.Tensor:
    """A copy of x with x's strides, offset and gaps, in a storage of its own."""
    if x.is_neg():
        return torch._neg_view(same_layout(torch._neg_view(x)))
    storage = x.untyped_storage().clone()
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(storage, x.storage_offset(), x.shape, x.stride())


# ---- checks ------------------------------------------------------------------------------------------------


def outcome(operator: Operator, run: Callable[[Given], dict[str, torch.Tensor]], given: Given) -> dict:
    """All that a call gives: outputs, what it changed in place, and the gradient at every leaf as "d<leaf>"."""
    given = dict(given)
    for name in operator.changed:
        given[name] = same_layout(given[name])
    leaves = {n: given[n].detach().requires_grad_() for n in operator.leaves if given[n] is not None}
    outputs = run({**given, **leaves})
    found = {n: x.detach() for n, x in outputs.items()}
    pairs = [(x, given[f"upstream_{n}"].to(x.dtype)) for n, x in outputs.items() if f"upstream_{n}" in given]
    if leaves and pairs:
        grads = torch.autograd.grad([x for x, _ in pairs], list(leaves.values()), [g for _, g in pairs])
        found |= {f"d{n}": g for n, g in zip(leaves, grads)}
    for name in operator.changed:
        found[name] = given[name]
    return found


def module_of(operator: Operator) -> ModuleType:
    return importlib.import_module(operator.module)


def in_dtype(given: Given, dtype: torch.dtype) -> Given:
    return mapped(given, lambda _, x: x.to(dtype) if x.is_floating_point() else x)


def check_values(operator: Operator, impl: str, dtype: torch.dtype, module=None, device: str = "cpu") -> None:
    """Raise AssertionError unless every result is as near to float64 as the definition in the same dtype."""
    module = module or module_of(operator)
    given = in_dtype(operator.inputs(torch.Generator().manual_seed(0)), dtype)
    truth = outcome(operator, lambda g: operator.reference(module, g), in_dtype(given, torch.float64))
    same = outcome(operator, lambda g: operator.reference(module, g), given)
    there = mapped(given, lambda _, x: x.to(device))
    found = outcome(operator, lambda g: operator.run(module, g, impl), there)
    for name, x in found.items():
        compare(name, x.cpu(), truth[name], same[name], dtype, least_scale=1.0)


def check_layout(
    operator: Operator, impl: str, layout: str, module=None, at_once: bool = False, device: str = "cpu"
) -> None:
    """Raise AssertionError unless hostile arguments give what dense ones give and leave their neighbours alone.

    One argument after the other, or all at once, which is quicker and cannot say which."""
    module = module or module_of(operator)
    drawn = operator.inputs(torch.Generator().manual_seed(0))
    if at_once and layout != "expanded":
        both = tuple(mapped(g, lambda _, x: moved(x, device)) for g in laid_out(drawn, layout))
        _compare_layout(operator, impl, layout, module, both, "all arguments")
        return
    for name in every_tensor(drawn):
        if operator.hostile is not None and name not in operator.hostile:
            continue
        hostile, plain = laid_out(drawn, layout, only=name)
        if layout == "expanded" and name in operator.changed:
            with contextlib.suppress(ValueError):
                outcome(operator, lambda g: operator.run(module, g, impl), hostile)
                raise AssertionError(f"{operator.name}: an expanded {name} cannot be updated, and nothing says so")
            continue
        _compare_layout(operator, impl, layout, module, (hostile, plain), name)


def _compare_layout(operator, impl, layout, module, both: tuple[Given, Given], name: str) -> None:
    found, expected = (outcome(operator, lambda g: operator.run(module, g, impl), given) for given in both)
    for key, x in found.items():
        # not bit by bit: torch's products take another way through memory for another layout
        torch.testing.assert_close(
            x, expected[key], rtol=1e-4, atol=1e-4, msg=f"{operator.name}, {impl}: {name} {layout} changes {key}"
        )
        if key in operator.changed:
            assert _gaps(x).equal(_gaps(both[0][key])), f"{operator.name}: neighbours of {key} are overwritten"


def _gaps(x: torch.Tensor) -> torch.Tensor:
    """What else lies in the storage of x, as bytes."""
    bare = torch._neg_view(x) if x.is_neg() else x
    whole = same_layout(bare)
    whole.zero_()
    return torch.tensor(whole.untyped_storage(), dtype=torch.uint8)


def with_a_nan(drawn: Given, reference: Callable[[Given], dict]) -> Iterator[tuple[str, Given, dict]]:
    """For each floating tensor: its name, the inputs with a NaN in its middle, and where that must show in each result.

    Where the reference has NaN and moving the number moves the result: a reference of masked products spreads NaN over
    zero times NaN to what does not depend on it."""

    def changed(name, to):
        def change(key, x):
            if key != name:
                return x
            x = x.clone()
            x.view(-1)[x.numel() // 2] = to
            return x

        return mapped(drawn, change)

    plain = reference(drawn)
    for name in floating_tensors(drawn):
        given = changed(name, torch.nan)
        nan, moved = reference(given), reference(changed(name, 0.6789))
        yield name, given, {key: x.isnan() & (plain[key] != moved[key]) for key, x in nan.items()}


def check_nan(operator: Operator, impl: str, module=None, device: str = "cpu") -> None:
    """Raise AssertionError if a NaN that the definition passes on to a result does not reach it."""
    module = module or module_of(operator)
    drawn = operator.inputs(torch.Generator().manual_seed(0))

    def reference(given):
        return outcome(operator, lambda g: operator.reference(module, g), in_dtype(given, torch.float64))

    for name, given, reached in with_a_nan(drawn, reference):
        there = mapped(given, lambda _, x: x.to(device))
        found = outcome(operator, lambda g: operator.run(module, g, impl), there)
        for key, where in reached.items():
            assert not (where & ~found[key].cpu().isnan()).any(), (
                f"{operator.name}, impl={impl}: a NaN in {name} does not reach {key}"
            )


# ---- the operators -----------------------------------------------------------------------------------------


def _draw(random, **shapes):
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def _loss_inputs(reduction):
    def make(random):
        given = _draw(random, x=(13, 8), w=(20, 8), upstream_loss=(13,) if reduction == "none" else ())
        given["targets"] = torch.randint(20, (13,), generator=random)
        given["targets"][3] = -100
        return given

    return make


def _loss(reduction, softcap):
    def run(module, g, impl):
        options = dict(reduction=reduction, softcap=softcap, impl=impl, chunk_tokens=5)
        return {"loss": module.linear_cross_entropy(g["x"], g["w"], g["targets"], **options)}

    def reference(module, g):
        return {"loss": module.linear_cross_entropy_reference(g["x"], g["w"], g["targets"], softcap, reduction)}

    name = f"loss, {reduction}, {softcap}"
    return Operator(
        name, "kernels.cross_entropy", _loss_inputs(reduction), run, reference, ("x", "w"), (), ("reference", "triton")
    )


def _targets_inputs(random):
    given = {**_loss_inputs("sum")(random), "targets": torch.randint(20, (13, 2), generator=random)}
    given["targets"][3, 1] = given["targets"][4, 0] = -100
    return {**given, "weights": torch.rand(2, generator=random) + 0.2}


def _several_targets(module, g, impl):
    weights, how = g["weights"], dict(reduction="sum", softcap="sigmoid", impl=impl, chunk_tokens=5)
    return {"loss": module.linear_cross_entropy(g["x"], g["w"], g["targets"], target_weights=weights, **how)}


def _several_targets_reference(module, g):
    given = g["x"], g["w"], g["targets"], "sigmoid", "sum"
    return {"loss": module.linear_cross_entropy_reference(*given, target_weights=g["weights"])}


def _loss_8(module, g, impl):
    return {"loss": module.linear_cross_entropy(g["x"], g["w"], g["targets"], impl=impl, chunk_tokens=5, fp8=True)}


def _loss_8_reference(module, g):
    given = {**g, "x": g["x"].float(), "w": g["w"].float()}
    return {"loss": _loss_8(module, given, "reference")["loss"].to(torch.promote_types(g["x"].dtype, torch.float32))}


def _mlp_inputs(random):
    return _draw(random, x=(2, 5, 8), w_in=(12, 8), w_out=(8, 12), upstream_y=(2, 5, 8))


def _mlp(module, g, impl):
    return {"y": module.relu_squared_mlp(g["x"], g["w_in"], g["w_out"], impl=impl)}


def _normed_mlp(module, g, impl):
    return {"y": module.normed_mlp(g["x"], g["w_in"], g["w_out"], impl=impl)}


def _normed_mlp_reference(module, g):
    normed = module.rms_norm(g["x"])
    return {"y": g["x"] + module.relu_squared_mlp_reference(normed, g["w_in"], g["w_out"])}


def _mlp_reference(module, g):
    return {"y": module.relu_squared_mlp_reference(g["x"], g["w_in"], g["w_out"])}


# Products in 8 bits are defined by what rounds: their plain way, in float32 whatever the dtype of the truth.


def _mlp_8(module, g, impl):
    return {"y": module.relu_squared_mlp_8(g["x"], g["w_in"], g["w_out"], impl=impl)}


def _mlp_8_reference(module, g):
    x, w_in, w_out = (g[name].float() for name in ("x", "w_in", "w_out"))
    return {"y": module.relu_squared_mlp_8(x, w_in, w_out, impl="reference").to(g["x"].dtype)}


def _normed_mlp_8(module, g, impl):
    return {"y": module.normed_mlp_8(g["x"], g["w_in"], g["w_out"], impl=impl)}


def _normed_mlp_8_reference(module, g):
    x, w_in, w_out = (g[name].float() for name in ("x", "w_in", "w_out"))
    return {"y": module.normed_mlp_8(x, w_in, w_out, impl="reference").to(g["x"].dtype)}


def _normed_linear_8(module, g, impl):
    return dict(zip(("y", "first"), module.normed_linear_8(g["x"], g["w"], 3, impl=impl)))


def _normed_linear_8_reference(module, g):
    found = module.normed_linear_8(g["x"].float(), g["w"].float(), 3, impl="reference")
    return {name: y.to(g["x"].dtype) for name, y in zip(("y", "first"), found)}


def _normed_linear_8_inputs(random):
    return _draw(random, x=(2, 5, 8), w=(12, 8), upstream_y=(2, 5, 12), upstream_first=(2, 5, 3))


def _added_linear_8_inputs(random):
    return _draw(random, residual=(2, 5, 12), x=(2, 5, 8), w=(12, 8), upstream_y=(2, 5, 12))


def _added_linear_8(module, g, impl):
    return {"y": module.added_linear_8(g["residual"], g["x"], g["w"], impl=impl)}


def _added_linear_8_reference(module, g):
    residual, x, w = (g[name].float() for name in ("residual", "x", "w"))
    return {"y": module.added_linear_8(residual, x, w, impl="reference").to(g["x"].dtype)}


def _tables_inputs(random):
    rows = torch.randint(0, 7, (2, 5), generator=random)
    return {**_draw(random, a=(7, 6), b=(7, 6), upstream_a=(2, 5, 6), upstream_b=(2, 5, 6)), "rows": rows}


def _tables(module, g, impl):
    (a,), (b,) = module.rows_of_tables([g["a"], g["b"]], g["rows"], impl=impl)
    return {"a": a, "b": b}


def _tables_reference(module, g):
    return {name: g[name][g["rows"]] for name in ("a", "b")}


def _linear_8_inputs(random):
    return _draw(random, x=(2, 5, 8), w=(12, 8), upstream_y=(2, 5, 12))


def _linear_8(module, g, impl):
    return {"y": module.linear(g["x"], g["w"], impl=impl)}


def _linear_8_reference(module, g):
    return {"y": module.linear(g["x"].float(), g["w"].float(), impl="reference").to(g["x"].dtype)}


def _mix_inputs(random):
    shape = (2, 7, 16)
    return _draw(random, x=shape, x00=shape, x01=shape, lambdas=(3,), upstream_y=shape)


def _mix(module, g, impl):
    return {"y": module.residual_mix(g["x"], g["x00"], g["x01"], g["lambdas"], impl=impl)}


def _mix_reference(module, g):
    return {"y": module.residual_mix_reference(g["x"], g["x00"], g["x01"], g["lambdas"])}


def _norm_inputs(random):
    return _draw(random, x=(3, 5, 16), upstream_y=(3, 5, 16))


def _prologue_inputs(with_ve):
    def make(random):
        B, T, H, K, width = 2, 9, 2, 1, 16
        q, k = (B, T, H, width), (B, T, K, width)
        given = _draw(random, q=q, k=k, v=k, ve=k, s=(2,), upstream_q=q, upstream_k=k, upstream_v=k)
        angle = torch.arange(T)[:, None] * torch.linspace(0.1, 1, width // 2)
        return {**given, "ve": given["ve"] if with_ve else None, "cos": angle.cos(), "sin": angle.sin()}

    return make


_PROLOGUE = ("q", "k", "v", "ve", "s", "cos", "sin")


def _prologue(module, g, impl):
    return dict(zip("qkv", module.attention_inputs(*(g[n] for n in _PROLOGUE), impl=impl)))


def _prologue_reference(module, g):
    return dict(zip("qkv", module.attention_inputs_reference(*(g[n] for n in _PROLOGUE))))


def _head_inputs_inputs(random):
    """Every technique of the inputs at once but pairs, which go without offset keys."""
    B, T, H, width = 2, 9, 2, 16
    wide, narrow = (B, T, H, width), (B, T, H, width // 2)
    given = _draw(random, qkv=(B, T, 2 * H * width), ve=(B, T, H * width), factor=(B, T, H), more=(B, T, H * width))
    given |= _draw(random, s=(2,), upstream_q=narrow, upstream_k=narrow, upstream_v=wide, upstream_own=wide)
    angle = torch.arange(T)[:, None] * torch.linspace(0.1, 1, width // 4)
    return given | {"cos": angle.cos(), "sin": angle.sin(), "query_factor": torch.tensor(1.2)}


_HEAD_INPUTS = ("qkv", "ve", "factor", "more", "s")


def _head_inputs(module, g, impl):
    qkv, ve, factor, more, s = (g[n] for n in _HEAD_INPUTS)
    how = dict(ve_BTD=ve, factor_BTH=factor, more_BTD=more, s_2=s, query_factor=g["query_factor"], offset=True)
    how["with_own"] = True
    return module.head_inputs(qkv, (g["cos"], g["sin"]), heads=2, width=16, impl=impl, **how)._asdict()


def _head_inputs_reference(module, g):
    given = *(g[n] for n in _HEAD_INPUTS[1:]), g["query_factor"]
    how = dict(heads=2, width=16, value_norm=True, offset=True, paired=False)
    return module.head_inputs_reference(g["qkv"], (g["cos"], g["sin"]), *given, **how)._asdict()


def _head_outputs_inputs(random):
    B, T, H, width = 2, 9, 2, 16
    heads, by_token = (B, T, H, width), (B, T, H)
    return _draw(random, o=heads, own=heads, alpha=by_token, gate=by_token, upstream_y=(B, T, H * width))


_HEAD_OUTPUTS = ("o", "own", "alpha", "gate")


def _head_outputs(module, g, impl):
    return {"y": module.head_outputs(*(g[n] for n in _HEAD_OUTPUTS), measured=True, impl=impl).y}


def _head_outputs_reference(module, g):
    return {"y": module.head_outputs_reference(*(g[n] for n in _HEAD_OUTPUTS), paired=False)}


def _attention_inputs(K):
    def make(random):
        from kernels.attention import attention_plan

        B, T, H, width = 2, 70, 2, 16
        q, k = (B, T, H, width), (B, T, K, width)
        tokens = torch.ones(B, T, dtype=torch.int64)
        tokens[:, 0] = tokens[0, 33] = tokens[1, 5] = 0
        given = _draw(random, q=q, k=k, v=k, upstream_o=q)
        return {**given, "plan": attention_plan(tokens, eos_id=0, window_tokens=40)}

    return make


def _attention(module, g, impl):
    return {"o": module.attention(g["q"], g["k"], g["v"], g["plan"], scale=0.3, impl=impl)}


def _attention_reference(module, g):
    return {"o": module.attention_reference(g["q"], g["k"], g["v"], g["plan"], scale=0.3)}


def _looped(module, g, impl):
    return {"o": module.banded_attention(g["q"], g["k"], g["v"], g["plan"].first_key_BT, 0.3)}


def _layer_inputs(random):
    from kernels.attention import attention_plan

    B, T, H, K, width, D = 2, 20, 2, 1, 16, 8
    tokens = torch.ones(B, T, dtype=torch.int64)
    tokens[0, 7] = tokens[1, 3] = 0
    angle = torch.arange(T)[:, None] * torch.linspace(0.1, 1, width // 2)
    given = _draw(random, x=(B, T, D), w=((H + 2 * K) * width, D), ve=(B, T, K, width), s=(2,))
    given |= {"cos": angle.cos(), "sin": angle.sin(), "plan": attention_plan(tokens, eos_id=0, window_tokens=9)}
    return given | _draw(random, upstream_o=(B, T, H, width), upstream_x=(B, T, D))


def _layer(module, g, impl):
    shape = dict(heads=2, width=16, scale=0.3)
    rotary, both = (g["cos"], g["sin"]), dict(impl=impl, inputs_impl=impl)
    o, x = module.attention_layer(g["x"], g["w"], g["ve"], g["s"], rotary, g["plan"], **shape, **both)
    return {"o": o, "x": x}


def _momentum_inputs(random):
    return _draw(random, buffer=(6, 10), grad=(6, 10))


def _momentum(module, g, impl):
    return {"step": module.momentum_(g["buffer"], g["grad"], 0.9, impl=impl)}


def _momentum_reference(module, g):
    g["buffer"].copy_(0.9 * g["buffer"] + 0.1 * g["grad"])
    return {"step": 0.9 * g["buffer"] + 0.1 * g["grad"]}


def _update_inputs(random):
    return _draw(random, weight=(6, 10), update=(6, 10))


def _update(module, g, impl):
    module.apply_update_(g["weight"], None, g["update"], lr=0.3, weight_decay=0.1, impl=impl)
    return {}


def _update_reference(module, g):
    g["weight"].copy_(g["weight"] * 0.9 - 0.3 * g["update"])
    return {}


def _cautious(module, g, impl):
    module.apply_update_(g["weight"], None, g["update"], lr=0.3, weight_decay=0.1, cautious=True, impl=impl)
    return {}


def _cautious_reference(module, g):
    same_way = g["weight"].sign() * g["update"].sign() >= 0
    g["weight"].copy_(g["weight"] * (1 - 0.1 * same_way) - 0.3 * g["update"])
    return {}


def _rows_inputs(random):
    given = _draw(random, g=(2, 6, 9), v=(2, 6))
    return {**given, "v": given["v"].square()}


def _rows(module, g, impl):
    return {"y": module.normalize_rows_(g["g"], g["v"], beta2=0.9)}


def _rows_reference(module, g):
    g["v"].copy_(0.9 * g["v"] + 0.1 * g["g"].square().mean(-1))
    y = g["g"] / g["v"].sqrt()[..., None]
    return {"y": y * g["g"].norm(dim=(-2, -1), keepdim=True) / y.norm(dim=(-2, -1), keepdim=True)}


def _split_inputs(random):
    from kernels.muon import split_master

    given = _draw(random, master=(6, 10), update=(6, 10))
    high, low = split_master(given["master"])
    return {"high": high.view(torch.int16).clone(), "low": low.view(torch.int16).clone(), "update": given["update"]}


def _split(module, g, impl):
    weight = g["high"].view(torch.bfloat16)
    module.apply_update_(weight, g["low"], g["update"], lr=0.3, weight_decay=0.1, impl=impl)
    return {"master": module.join_master(weight, g["low"])}


def _split_reference(module, g):
    master = module.join_master(g["high"].view(torch.bfloat16), g["low"]).to(g["update"].dtype)
    master = master * 0.9 - 0.3 * g["update"]
    halves = module.split_master(master.float())
    for name, half in zip(("high", "low"), halves):
        g[name].copy_(half.view(torch.int16))
    return {"master": master}


def _orthogonal_inputs(random):
    return _draw(random, g=(2, 6, 9))


def _orthogonal(module, g, impl):
    return {"x": module.orthogonalize(g["g"], dtype=g["g"].dtype, impl=impl)}


def _orthogonal_reference(module, g):
    return {"x": module.orthogonalize_reference(g["g"], dtype=g["g"].dtype)}


_QKV = ("q", "k", "v")
_CPU = ("auto", "reference")
OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        *(_loss(reduction, softcap) for reduction, softcap in (("mean", "rsqrt"), ("none", None), ("sum", "sigmoid"))),
        Operator(
            "loss, several targets",
            "kernels.cross_entropy",
            _targets_inputs,
            _several_targets,
            _several_targets_reference,
            ("x", "w"),
            implementations=("reference", "triton"),
        ),
        Operator(
            "loss, 8 bits",
            "kernels.cross_entropy",
            _loss_inputs("mean"),
            _loss_8,
            _loss_8_reference,
            ("x", "w"),
            implementations=("reference", "triton"),
        ),
        Operator("mlp", "kernels.mlp", _mlp_inputs, _mlp, _mlp_reference, ("x", "w_in", "w_out")),
        Operator("normed mlp", "kernels.mlp", _mlp_inputs, _normed_mlp, _normed_mlp_reference, ("x", "w_in", "w_out")),
        Operator(
            "mlp, 8 bits",
            "kernels.mlp8",
            _mlp_inputs,
            _mlp_8,
            _mlp_8_reference,
            ("x", "w_in", "w_out"),
            implementations=("reference", "triton"),
        ),
        Operator(
            "normed mlp, 8 bits",
            "kernels.mlp8",
            _mlp_inputs,
            _normed_mlp_8,
            _normed_mlp_8_reference,
            ("x", "w_in", "w_out"),
            implementations=("reference", "triton"),
        ),
        Operator(
            "linear behind a norm, 8 bits",
            "kernels.mlp8",
            _normed_linear_8_inputs,
            _normed_linear_8,
            _normed_linear_8_reference,
            ("x", "w"),
            implementations=("reference", "triton"),
        ),
        Operator(
            "linear beside a residual, 8 bits",
            "kernels.mlp8",
            _added_linear_8_inputs,
            _added_linear_8,
            _added_linear_8_reference,
            ("residual", "x", "w"),
            implementations=("reference", "triton"),
        ),
        Operator(
            "rows of tables",
            "kernels.embedding",
            _tables_inputs,
            _tables,
            _tables_reference,
            ("a", "b"),
            implementations=("reference", "triton"),
        ),
        Operator(
            "linear, 8 bits",
            "kernels.products8",
            _linear_8_inputs,
            _linear_8,
            _linear_8_reference,
            ("x", "w"),
            implementations=("reference", "triton"),
        ),
        Operator(
            "residual mix",
            "kernels.residual",
            _mix_inputs,
            _mix,
            _mix_reference,
            ("x", "x00", "x01", "lambdas"),
            implementations=_CPU,
        ),
        Operator(
            "norm",
            "kernels.norm",
            _norm_inputs,
            lambda m, g, impl: {"y": m.rms_norm(g["x"])},
            lambda m, g: {"y": m.rms_norm_reference(g["x"])},
            ("x",),
            implementations=("auto",),
        ),
        Operator(
            "prologue",
            "kernels.attention_inputs",
            _prologue_inputs(True),
            _prologue,
            _prologue_reference,
            _PROLOGUE[:5],
            implementations=("auto", "reference", "triton"),
        ),
        Operator(
            "prologue without value embedding",
            "kernels.attention_inputs",
            _prologue_inputs(False),
            _prologue,
            _prologue_reference,
            _PROLOGUE[:5],
        ),
        Operator(
            "head inputs",
            "kernels.heads",
            _head_inputs_inputs,
            _head_inputs,
            _head_inputs_reference,
            _HEAD_INPUTS,
            implementations=("reference", "triton"),
        ),
        Operator(
            "head outputs",
            "kernels.heads",
            _head_outputs_inputs,
            _head_outputs,
            _head_outputs_reference,
            _HEAD_OUTPUTS,
            implementations=("reference", "triton"),
        ),
        Operator("attention", "kernels.attention", _attention_inputs(2), _attention, _attention_reference, _QKV),
        Operator(
            "attention, grouped",
            "kernels.attention",
            _attention_inputs(1),
            _attention,
            _attention_reference,
            _QKV,
            implementations=("auto", "reference", "triton", "specialised"),
        ),
        Operator(
            "attention, looped",
            "kernels.attention",
            _attention_inputs(1),
            _looped,
            _attention_reference,
            _QKV,
            implementations=("auto",),
        ),
        Operator(
            "attention layer",
            "kernels.attention_layer",
            _layer_inputs,
            _layer,
            lambda m, g: _layer(m, g, "reference"),
            ("x", "w", "ve", "s"),
            half=False,  # its scalars and tables are float32 in every dtype: the family's cases have half precision
        ),
        Operator(
            "momentum",
            "kernels.muon",
            _momentum_inputs,
            _momentum,
            _momentum_reference,
            changed=("buffer",),
            half=False,
        ),
        Operator("update", "kernels.muon", _update_inputs, _update, _update_reference, changed=("weight",), half=False),
        Operator(
            "cautious update",
            "kernels.muon",
            _update_inputs,
            _cautious,
            _cautious_reference,
            changed=("weight",),
            half=False,
        ),
        Operator(
            "rows of one size",
            "kernels.muon",
            _rows_inputs,
            _rows,
            _rows_reference,
            changed=("v",),
            implementations=("auto",),
            half=False,
        ),
        Operator(
            "update of a split weight",
            "kernels.muon",
            _split_inputs,
            _split,
            _split_reference,
            changed=("high", "low"),
            half=False,
        ),
        Operator("orthogonalize", "kernels.muon", _orthogonal_inputs, _orthogonal, _orthogonal_reference),
    )
}
