"""The losses of LDFS (arXiv 2405.02586), ARF (arXiv 2404.06244) and DiVE (arXiv 2511.09973), each a
pure function that can be pasted alone.

Paste a function together with the two imports below; nothing else is needed. Everything is a batch
of B rows of L2-normalised CLIP features of length d, in float32 or float64, outside autocast
(in bfloat16 numbers near 100 are half a unit apart); every loss is a mean over the batch, with
finite values and gradients for all finite input.

The equations are this project's reconstruction in the papers' letters: none of the papers'
equations could be had, nor is there public code. What the papers do not say is marked as a choice,
with its alternative.
"""

import torch
import torch.nn.functional as F


def local_adaptation(z, z_hat, text_source, text_target):
    """L_ld = mean_i [ 1 − cos( ẑ_i − z_i,  t_i^k − t_i^s ) ], LDFS's instance-conditional local
    adaptation loss.

    z, z_hat: (B, d) image features, original and synthesised. text_source, text_target: (B, d)
    features of each image's own caption in the words of the source and of the target domain.
    Returns a scalar in [0, 2]. With texts of its class in place of the image's own this is
    LADS's direction, with one text for the domain StyleGAN-NADA's: both are global.
    Source: LDFS, figures 2 and 3 (b).
    CHOICE: ẑ of unit norm, as it is used afterwards; alternative: the mapper's output before it is
    normalised, as in LADS (ldfs:unit=0).
    """
    # The cosine of a zero-length shift (ẑ = z, say from a zero-initialised residual mapper) has no
    # value. Norms count as at least eps, so it is 0 there; a larger eps than the usual 1e-8 keeps
    # that point's gradient, 1/eps, bearable.
    return (1 - F.cosine_similarity(z_hat - z, text_target - text_source, dim=-1, eps=1e-4)).mean()


def pairwise_relation(z, z_hat, form="angle"):
    """L_pair = mean_{i≠j} | ∠(ẑ_i, ẑ_j) − ∠(z_i, z_j) |, LDFS's pairwise relation regulariser.

    z, z_hat: (B, d). form: "angle" in radians, or "cosine" for the difference of cosines, the
    cheaper and smoother one.
    Returns a scalar, 0 for a batch of one (it has no pair). Raises ValueError for any other form.
    Source: LDFS, figure 2 ("aligns angles between original CLIP features and synthesized
    features").
    CHOICE: absolute difference, averaged over all ordered pairs, so that a few large changes do not
    rule; alternative: square.
    """
    if form not in ("angle", "cosine"):
        raise ValueError(f'form is {form!r}, not "angle" or "cosine"')
    precise = torch.promote_types(z.dtype, torch.float32)
    z, z_hat = F.normalize(z.to(precise), dim=-1), F.normalize(z_hat.to(precise), dim=-1)
    relation, relation_hat = z @ z.T, z_hat @ z_hat.T  # (B, B) cosines
    if form == "angle":
        # arccos has an infinite gradient at ±1, where equal features lie: stop just short of it
        relation = relation.clamp(-1 + 1e-6, 1 - 1e-6).arccos()
        relation_hat = relation_hat.clamp(-1 + 1e-6, 1 - 1e-6).arccos()
    others = 1 - torch.eye(len(z), dtype=z.dtype, device=z.device)
    return ((relation_hat - relation).abs() * others).sum() / max(len(z) * (len(z) - 1), 1)


def stochastic_text(text, sigma, generator=None):
    """t~ = norm( t + σ ε ),  ε ~ N(0, I), LDFS's stochastic text feature augmentation.

    text: (B, d) unit-norm text features. sigma: standard deviation per coordinate (the noise's
    length is about σ √d, so σ = 0.02 at d = 512 is already half as long as the text). generator:
    torch.Generator on the device of `text`.
    Call it once for the source text and once for the target text: the same ε would cancel in their
    difference.
    Source: LDFS, figure 2.
    CHOICE: isotropic Gaussian, renormalised, the simplest there is, drawn anew at each step, for
    source and target apart; alternative: noise along measured style directions, or on the target's
    text alone.
    """
    if sigma == 0:
        return text
    noise = torch.randn(text.shape, generator=generator, dtype=text.dtype, device=text.device)
    return F.normalize(text + sigma * noise, dim=-1)


def class_consistency(z_hat, class_text, labels, logit_scale):
    """L_cls = CE( s · ẑ Tᵀ, y ), which keeps the class readable in a synthesised feature.

    z_hat: (B, d). class_text: T, (C, d), unit norm. labels: y, (B,) class indices. logit_scale: s,
    the factor itself (100 in CLIP), not its logarithm. Also CLIP's classification loss on original
    features, with z in place of ẑ.
    Source: LADS (Dunlap et al., ICLR 2023), where s = 1; LDFS's figures do not show it (see Recipe
    in core/methods.py).
    """
    return F.cross_entropy(logit_scale * z_hat @ class_text.T, labels)


def clip_contrastive(image, text, logit_scale):
    """L_con = ½ [ CE( s · F Gᵀ, arange B ) + CE( s · G Fᵀ, arange B ) ], CLIP's contrastive loss.

    image, text: F and G, (B, d), unit norm, row i of one belonging to row i of the other.
    logit_scale: s, the factor itself. Equal to open_clip.ClipLoss.
    Source: CLIP (arXiv 2103.00020, figure 3); ARF uses it for all of its terms.
    """
    targets = torch.arange(len(image), device=image.device)
    image_to_text = F.cross_entropy(logit_scale * image @ text.T, targets)
    text_to_image = F.cross_entropy(logit_scale * text @ image.T, targets)
    return (image_to_text + text_to_image) / 2


def average_vector(u, v, m):
    """L_avl = mean_j ( ‖u_j − m‖² + ‖v_j − m‖² ), DiVE's average vector loss.

    u, v: (B, d) difference vectors of image-text pairs, the finetuned feature minus the pretrained
    one: u_j = f(x_j) − f_0(x_j), v_j = g(t_j) − g_0(t_j). m: (d,) their average over training. If
    all vectors are equal, the pretrained features are only shifted, and their geometry stays.
    Returns a scalar, 0 where all vectors equal m.
    Source: DiVE; its abstract states the idea, a third party's summary of the paper the equation.
    CHOICE: features of unit norm, as in all other losses; alternative: the towers' raw output.
    """
    return ((u - m).square().sum(-1) + (v - m).square().sum(-1)).mean()


def pairwise_vector(u, v):
    """L_pvl = mean_j ‖u_j − v_j‖², DiVE's pairwise vector loss: a pair's image and text move alike.

    u, v: (B, d) difference vectors, as in `average_vector`. Returns a scalar.
    Source: as for `average_vector`.
    """
    return (u - v).square().sum(-1).mean()
