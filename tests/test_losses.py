"""losses.py against slow loops, closed forms, float64 gradients, invariances, and the traps of the
papers.
"""

import inspect
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F

import losses
from losses import (
    average_vector,
    class_consistency,
    clip_contrastive,
    local_adaptation,
    pairwise_relation,
    pairwise_vector,
    stochastic_text,
)


def unit(*shape, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


Z, Z_HAT, T_S, T_K = (unit(6, 5, seed=s) for s in range(4))


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b))


# --- slow loops -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_local_adaptation_is_the_loop(dtype):
    total = 0
    for z, z_hat, s, k in zip(Z, Z_HAT, T_S, T_K):
        a, b = z_hat - z, k - s
        total += 1 - dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))
    got = local_adaptation(*(x.to(dtype) for x in (Z, Z_HAT, T_S, T_K)))
    assert got.dtype == dtype
    assert got.item() == pytest.approx(total / len(Z), rel=1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("form", ["angle", "cosine"])
def test_pairwise_relation_is_the_loop(form):
    relation = math.acos if form == "angle" else float
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    total = sum(abs(relation(dot(Z_HAT[i], Z_HAT[j])) - relation(dot(Z[i], Z[j]))) for i, j in pairs)
    assert pairwise_relation(Z, Z_HAT, form).item() == pytest.approx(total / len(pairs), rel=1e-12)


def test_dives_losses_are_the_loops_in_value_and_gradient():
    u, v, m = (unit(*shape, seed=s) for shape, s in (((6, 5), 0), ((6, 5), 1), ((5,), 2)))
    u.requires_grad_()
    average = pairwise = 0
    for u_j, v_j in zip(u, v):
        average += sum((a - c) ** 2 + (b - c) ** 2 for a, b, c in zip(u_j, v_j, m)) / len(u)
        pairwise += sum((a - b) ** 2 for a, b in zip(u_j, v_j)) / len(u)
    for got, expected in ((average_vector(u, v, m), average), (pairwise_vector(u, v), pairwise)):
        assert got.item() == pytest.approx(expected.item(), rel=1e-12)
        [gradient], [true_gradient] = torch.autograd.grad(got, u), torch.autograd.grad(expected, u)
        assert torch.allclose(gradient, true_gradient, atol=1e-12)


def test_a_shift_of_all_features_costs_dive_nothing():
    """… once m has arrived; features that move apart cost more than their common part."""
    shift = unit(5).expand(6, 5)
    assert average_vector(shift, shift, shift[0]) == pairwise_vector(shift, shift) == 0
    assert average_vector(shift, shift, torch.zeros(5)).item() == pytest.approx(2)
    assert average_vector(shift, -shift, shift[0]) > 0 and pairwise_vector(shift, -shift) > 0


def test_class_consistency_is_the_loop():
    text, labels = unit(3, 5, seed=9), [0, 2, 1, 1, 0, 2]
    total = 0
    for z_hat, y in zip(Z_HAT, labels):
        logits = [7 * dot(z_hat, t) for t in text]
        total += math.log(sum(math.exp(x) for x in logits)) - logits[y]
    assert class_consistency(Z_HAT, text, torch.tensor(labels), 7.0).item() == pytest.approx(total / 6, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clip_contrastive_equals_open_clip_to_the_last_digit(dtype):
    image, text = Z.to(dtype), T_S.to(dtype)
    assert clip_contrastive(image, text, 31.7).item() == open_clip.ClipLoss()(image, text, 31.7).item()


# --- closed forms -----------------------------------------------------------------------------------------------------


def test_local_adaptation_closed_forms():
    east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    zero = torch.zeros(1, 2)
    assert local_adaptation(zero, east, zero, east) == 0   # along the text direction
    assert local_adaptation(zero, north, zero, east) == 1  # across it
    assert local_adaptation(zero, -east, zero, east) == 2  # against it


def test_pairwise_relation_closed_form():
    right_angle = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    sixty = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(3) / 2]], dtype=torch.float64)
    assert pairwise_relation(right_angle, sixty).item() == pytest.approx(math.pi / 6)
    assert pairwise_relation(right_angle, sixty, "cosine").item() == pytest.approx(0.5)


def test_clip_contrastive_closed_form():
    """Two orthogonal pairs at s = 1: every row's logits are (1, 0), so the loss is log(1 + 1/e)."""
    assert clip_contrastive(torch.eye(2), torch.eye(2), 1.0).item() == pytest.approx(math.log(1 + math.exp(-1)))


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [
    lambda a, b: local_adaptation(a, b, T_S, T_K),
    lambda a, b: local_adaptation(Z, Z_HAT, a, b),
    lambda a, b: pairwise_relation(a, b),
    lambda a, b: pairwise_relation(a, b, "cosine"),
    lambda a, b: class_consistency(a, b, torch.tensor([0, 2, 1, 1, 0, 2]), 7.0),
    lambda a, b: clip_contrastive(a, b, 7.0),
])
def test_gradients(loss):
    a, b = (x.clone().requires_grad_() for x in (Z, Z_HAT))
    assert torch.autograd.gradcheck(loss, (a, b))


# --- invariances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [
    lambda q: local_adaptation(Z @ q, Z_HAT @ q, T_S @ q, T_K @ q),
    lambda q: pairwise_relation(Z, Z_HAT @ q),  # turning all features together changes no angle
    lambda q: clip_contrastive(Z @ q, T_S @ q, 7.0),
])
def test_rotation_changes_nothing(loss):
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    assert loss(rotation).item() == pytest.approx(loss(torch.eye(5, dtype=torch.float64)).item(), rel=1e-9)


@pytest.mark.parametrize("loss", [
    lambda i: local_adaptation(Z[i], Z_HAT[i], T_S[i], T_K[i]),
    lambda i: pairwise_relation(Z[i], Z_HAT[i]),
    lambda i: clip_contrastive(Z[i], T_S[i], 7.0),
])
def test_order_of_the_batch_changes_nothing(loss):
    assert loss(torch.tensor([3, 1, 5, 0, 2, 4])).item() == pytest.approx(loss(torch.arange(6)).item(), rel=1e-12)


def test_local_adaptation_ignores_the_length_of_directions():
    twice = local_adaptation(Z, Z + 2 * (Z_HAT - Z), T_S, T_S + 3 * (T_K - T_S))
    assert twice.item() == pytest.approx(local_adaptation(Z, Z_HAT, T_S, T_K).item(), rel=1e-9)


# --- traps ------------------------------------------------------------------------------------------------------------


def test_no_shift_has_a_finite_gradient():
    """ẑ = z, as from a zero-initialised residual mapper: a cosine of zero length."""
    z_hat = Z.clone().requires_grad_()
    loss = local_adaptation(Z, z_hat, T_S, T_K)
    loss.backward()
    assert loss.item() == 1 and z_hat.grad.isfinite().all() and z_hat.grad.abs().max() < 1e5
    assert local_adaptation(Z, Z_HAT, T_S, T_S).item() == 1  # and no text direction


@pytest.mark.parametrize("form", ["angle", "cosine"])
def test_a_batch_of_one_has_no_pair(form):
    z_hat = Z_HAT[:1].clone().requires_grad_()
    loss = pairwise_relation(Z[:1], z_hat, form)
    loss.backward()
    assert loss.item() == 0 and z_hat.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_and_opposite_features_have_finite_angles(dtype):
    """arccos has an infinite gradient at ±1."""
    z = torch.stack([Z[0], Z[0], -Z[0], Z[1]]).to(dtype)
    z_hat = z.clone().requires_grad_()
    loss = pairwise_relation(z.flip(0), z_hat)
    loss.backward()
    assert loss.isfinite() and z_hat.grad.isfinite().all()
    assert pairwise_relation(z, z).item() == 0


def test_pairwise_relation_refuses_an_unknown_form():
    with pytest.raises(ValueError, match="'angles'"):
        pairwise_relation(Z, Z_HAT, "angles")


def test_stochastic_text_without_noise_and_with_a_generator():
    assert torch.allclose(stochastic_text(T_S, 0.0), T_S, atol=1e-15)
    one, same, other = (stochastic_text(T_S, 0.1, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.allclose(one.norm(dim=-1), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("sigma, expected", [(0.001, 0.998), (0.005, 0.95), (0.01, 0.84), (0.02, 0.62), (0.04, 0.36)])
def test_sigma_drowns_the_direction_as_published(sigma, expected):
    """The table of the notes on LDFS: mean cosine of noisy and clean direction at d = 512, |Δt| =
    0.5.
    """
    source = unit(4000, 512)
    across = F.normalize(unit(4000, 512, seed=1) - source * (unit(4000, 512, seed=1) * source).sum(1, keepdim=True), dim=1)
    angle = 2 * math.asin(0.25)
    target = math.cos(angle) * source + math.sin(angle) * across
    generator = torch.Generator().manual_seed(2)
    noisy = stochastic_text(target, sigma, generator) - stochastic_text(source, sigma, generator)
    assert F.cosine_similarity(noisy, target - source).mean().item() == pytest.approx(expected, abs=0.01)


def test_noise_shared_by_both_texts_would_cancel():
    """Why stochastic_text is called twice: with one ε the direction hardly changes at a σ that else
    halves its cosine.
    """
    source, target = unit(500, 512), unit(500, 512, seed=1)
    shared = [stochastic_text(t, 0.05, torch.Generator().manual_seed(7)) for t in (source, target)]
    generator = torch.Generator().manual_seed(7)
    own = [stochastic_text(t, 0.05, generator) for t in (source, target)]
    cosine = [F.cosine_similarity(k - s, target - source).mean().item() for s, k in (shared, own)]
    assert cosine[0] > 0.99 and cosine[1] < 0.8


def test_each_loss_can_be_pasted_alone():
    for name, function in inspect.getmembers(losses, inspect.isfunction):
        scope = {"torch": torch, "F": F}
        exec(inspect.getsource(function), scope)
        others = {n for n, f in inspect.getmembers(losses, inspect.isfunction)} - {name}
        assert not others & set(scope[name].__code__.co_names)
        assert function.__doc__ and "Source" in function.__doc__
