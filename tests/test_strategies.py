"""strategies/: which parameters train, features and heads of each strategy, prompts, CLIPood's
average. The training loop is tested in test_finetune.py.
"""

import copy
import functools
from dataclasses import replace

import open_clip
import pytest
import torch
import torch.nn.functional as F

import data
import features
from batches import Batch
from core.config import parse
from finetune import ldfs_losses, original_and_synthesised
from mapper import Mapper
from sets.load import load_run
from strategies import towers
from strategies.base import LinearProbe
from strategies.prompts import PROMPTS, CoCoOp, CoOp, MaPLe
from strategies.towers import BothTowers, CLIPood, FullFinetuning, beta_weights

TEXT_TOWER = {"transformer", "token_embedding", "positional_embedding", "text_projection", "ln_final"}
TEXT_TOWER |= {"logit_scale"}
STRATEGIES = ["linear", "coop", "cocoop", "maple", "full", "clipood", "towers"]
FROZEN = ["linear", "coop", "cocoop"]


class World:
    """The tiny data set and its CLIP, and strategies on both."""

    def __init__(self, tiny_data, tiny_clip, run):
        argv = ["tiny", "photo", "--data", tiny_data, "--model", tiny_clip, "--run", run]
        self.settings, self.dataset = load_run(parse("", [str(argument) for argument in argv]))
        self.clip = features.load_clip(self.settings)
        self.names = self.dataset.classnames
        self.items = self.dataset.split("photo", "photo", "train", 0)
        self.labels = torch.tensor([label for _, label in self.items])
        self.images = torch.stack([self.clip.preprocess(at.decode()) for at, _ in self.items])
        self.class_text = features.encode_texts(self.clip, data.class_texts(self.dataset, "photo"))

    def strategy(self, train, clip=None, mappers=None, steps=9, **options):
        """Return a new strategy, with generators of seed 0."""
        clip, torch_generator = clip or self.clip, torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        if train in PROMPTS:
            return PROMPTS[train](clip, self.names, "a photo", mappers, torch_generator)
        if train == "linear":
            scratch = torch.randn(self.class_text.shape, generator=torch_generator)
            return LinearProbe(clip, scratch, mappers)
        if train == "clipood":
            return CLIPood(clip, self.class_text, steps, mappers, **options)
        if train == "towers":
            tokens = clip.tokenizer(data.class_texts(self.dataset, "photo"))
            return BothTowers(clip, tokens, mappers, **options)
        return FullFinetuning(clip, self.class_text, mappers, **options)

    def batch(self, train, mappers=None):
        """Return the batch of all training images: features for a frozen tower, else pixels."""
        if train not in FROZEN:
            return Batch(self.labels, images=self.images)
        z = self.clip.encode_image(self.images).detach()
        return Batch(self.labels, torch.stack([z, *(m(z) for m in (mappers or {}).values())]))


@pytest.fixture
def world(tiny_data, tiny_clip, tmp_path):
    return World(tiny_data, tiny_clip, tmp_path / "run")


def loss_of(strategy, batch):
    return sum(ldfs_losses(strategy, batch).values())


def train_on(strategy, batch, steps=3, lr=1e-3, weight_decay=0.0):
    parameters = [p for p in strategy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=weight_decay)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(strategy, batch).backward()
        optimizer.step()
        strategy.after_step()
    strategy.finish()


def frozen_mappers():
    torch.manual_seed(0)
    return {name: Mapper(32).requires_grad_(False) for name in ("sketch", "cartoon")}


def changed(before, after):
    return {k.split(".")[0] for k in after if not torch.equal(before[k], after[k])}


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


# --- what is trained ---------------------------------------------------------------------------------


@pytest.mark.parametrize("train, trained, moves", [
    ("linear", {"head"}, set()), ("coop", {"vectors"}, set()), ("cocoop", {"vectors", "meta_net"}, set()),
    ("maple", {"vectors", "couplings"}, set()), ("full", {"head", "towers"}, {"visual"}),
    ("clipood", {"towers"}, {"visual"}), ("towers", {"towers"}, {"visual"} | TEXT_TOWER),
])
def test_only_what_is_trained_moves(world, train, trained, moves):
    mappers = frozen_mappers()
    before = copy.deepcopy(mappers)
    strategy = world.strategy(train, mappers=mappers)
    start = copy.deepcopy(strategy.state_dict())
    train_on(strategy, world.batch(train, mappers))
    assert changed(world.clip.original, world.clip.model.state_dict()) == moves
    for name, mapper in mappers.items():
        assert not changed(before[name].state_dict(), mapper.state_dict())
        assert all(p.grad is None for p in mapper.parameters())
    requires = {name.split(".")[0] for name, p in strategy.named_parameters() if p.requires_grad}
    assert requires == trained
    assert changed(start, strategy.state_dict()) - {"average"} == trained


@pytest.mark.parametrize("train, prefixes", [
    ("linear", {"head"}), ("coop", {"vectors"}), ("cocoop", {"vectors", "meta_net"}),
    ("maple", {"vectors", "couplings"}), ("full", {"head", "towers"}), ("clipood", {"head", "towers", "average", "t"}),
    ("towers", {"towers"}),
])
def test_a_checkpoint_holds_what_is_trained_and_not_clip_or_mappers(world, train, prefixes):
    state = world.strategy(train, mappers=frozen_mappers()).state_dict()
    assert {name.split(".")[0] for name in state} == prefixes
    if "towers" in prefixes:
        assert features.towers_of(state).keys() == world.clip.model.state_dict().keys()


def test_of_a_locked_tower_the_last_groups_train(world):
    train_on(world.strategy("full", unlocked_groups=1), world.batch("full"))
    now = world.clip.model.state_dict()
    assert {k for k, v in now.items() if not torch.equal(v, world.clip.original[k])} == {"visual.proj"}
    for options, moves in (
        ({"unlocked_groups": 0}, TEXT_TOWER), ({"lock_text": True}, {"visual"}),
        ({"unlocked_groups": 1, "lock_text": True}, {"visual"}),
    ):
        world.clip.reset()
        train_on(world.strategy("towers", **options), world.batch("towers"))
        assert changed(world.clip.original, world.clip.model.state_dict()) == moves
    world.clip.reset()
    for train, options in (("clipood", {}), ("towers", {"lock_text": True})):
        strategy = world.strategy(train, unlocked_groups=0, **options)
        assert not any(p.requires_grad for p in strategy.parameters())


def test_only_a_probe_is_too_fast_for_partial_checkpoints(world):
    assert [train for train in STRATEGIES if not world.strategy(train).slow] == ["linear"]


# --- features ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", STRATEGIES)
def test_features_are_named_by_their_terms(world, train):
    mappers = frozen_mappers()
    strategy, batch = world.strategy(train, mappers=mappers), world.batch(train, mappers)
    z, z_hats = original_and_synthesised(strategy, batch)
    assert [*ldfs_losses(strategy, batch)] == ["L_con", "L_con sketch", "L_con cartoon"]
    if train != "maple":  # its prompts change images from the start
        assert torch.allclose(z, world.clip.encode_image(world.images), atol=1e-6)
    for domain, mapper in mappers.items():
        assert torch.allclose(z_hats[domain], mapper(z), atol=1e-6)
    assert [*ldfs_losses(world.strategy(train), world.batch(train))] == ["L_con"]


def test_features_and_mappers_of_different_number_are_an_error(world):
    with pytest.raises(ValueError):
        ldfs_losses(world.strategy("linear", mappers=frozen_mappers()), world.batch("linear"))


@pytest.mark.parametrize("train", ["full", "clipood", "towers", "maple"])
def test_the_current_features_are_mapped_and_pass_their_gradient_on(world, train):
    mappers = frozen_mappers()
    strategy, batch = world.strategy(train, mappers=mappers), world.batch(train)
    before = original_and_synthesised(strategy, batch)[1]["sketch"].detach()
    original_and_synthesised(strategy, batch)[1]["sketch"][:, 0].sum().backward()
    image_side = strategy.couplings if train == "maple" else world.clip.model.visual
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in image_side.parameters())
    assert all(p.grad is None for m in mappers.values() for p in m.parameters())
    train_on(strategy, batch)
    assert not torch.allclose(original_and_synthesised(strategy, batch)[1]["sketch"], before, atol=1e-3)


# --- heads -------------------------------------------------------------------------------------------


def test_a_probe_scales_cosines_and_has_no_bias(world):
    strategy, z = world.strategy("linear"), unit(5, 32)
    assert not torch.allclose(F.normalize(strategy.head.weight, dim=-1), world.class_text, atol=0.1)
    expected = world.clip.logit_scale * z @ strategy.head.weight.T
    assert torch.allclose(strategy.head_for(None)(z), expected) and strategy.head.bias is None


def test_both_ways_of_starting_full_finetuning_contain_the_scale(world):
    z, probe = unit(5, 32), torch.randn(3, 32)
    assert torch.allclose(
        world.strategy("full").head_for(None)(z), world.clip.logit_scale * z @ world.class_text.T, atol=1e-4
    )
    lpft = FullFinetuning(world.clip, probe)
    assert torch.allclose(lpft.head.weight, world.clip.logit_scale * probe) and not lpft.head.bias.any()


@pytest.mark.parametrize("lock_text", [False, True])
def test_the_head_of_both_towers_is_what_the_text_tower_makes_of_prompts_now(world, lock_text):
    strategy, z = world.strategy("towers", lock_text=lock_text), unit(5, 32)
    before = strategy.head_for(None)(z)
    assert torch.allclose(before, world.clip.logit_scale * z @ world.class_text.T, atol=1e-4)
    train_on(strategy, world.batch("towers"), lr=1e-2)
    text = features.encode_texts(world.clip, data.class_texts(world.dataset, "photo"))
    now = strategy.head_for(None)(z)
    assert torch.allclose(now, world.clip.logit_scale * z @ text.T, atol=1e-4)
    assert torch.equal(now, before) == lock_text


def test_full_finetuning_takes_wise_fts_first_steps(world):
    """Against the published formula: W starts as s · T inside of the parameter, b as 0, both
    trained by AdamW on CE(W z + b).
    """
    strategy = world.strategy("full")
    train_on(strategy, world.batch("full"), steps=3, weight_decay=0.1)
    got = copy.deepcopy(strategy.state_dict())

    world.clip.reset()
    model = world.clip.model
    w = (model.logit_scale.exp() * world.class_text).detach().clone().requires_grad_()
    b = torch.zeros(3, requires_grad=True)
    parameters = [w, b, *model.visual.requires_grad_().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        z = F.normalize(world.clip.image_tower(world.images), dim=-1)
        optimizer.zero_grad()
        F.cross_entropy(z @ w.T + b, world.labels).backward()
        optimizer.step()
    assert torch.allclose(got["head.weight"], w, atol=1e-5) and torch.allclose(got["head.bias"], b, atol=1e-5)
    assert b.abs().max() > 1e-3
    assert torch.allclose(got["towers.visual.proj"], model.visual.proj, atol=1e-4)


def test_the_logit_scale_stays_below_a_hundred(world):
    strategy = world.strategy("towers")
    world.clip.model.logit_scale.data += 10
    strategy.after_step()
    assert 99 < world.clip.logit_scale <= 100 + 1e-3


@pytest.mark.parametrize("train, part", [("towers", 0.1), ("coop", 0.2), ("cocoop", 0.2), ("maple", 0.2)])
def test_with_micro_batches_the_loss_is_the_same_and_less_memory_is_used(world, train, part):
    """What autograd saves: of micro-batches nothing but the pixels."""
    sizes = []

    def count(x):
        sizes[-1] += x.numel() if x.grad_fn else 0  # activations, not weights
        return x

    def gradients(micro_batch):
        world.clip.micro_batch = micro_batch
        strategy, batch = world.strategy(train), world.batch(train)
        if train == "cocoop":  # images that differ, and a prompt of its own for each
            batch.z = unit(1, len(batch.labels), 32)
            torch.nn.init.normal_(strategy.meta_net[2].weight)
        world.clip.model.requires_grad_().zero_grad()
        sizes.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss = loss_of(strategy, batch)
        loss.backward()
        parameters = [*world.clip.model.parameters(), *strategy.parameters()]
        return [loss.detach(), *(p.grad for p in parameters if p.grad is not None)]

    at_once, in_parts = gradients(None), gradients(2)
    assert len(at_once) > 10 and at_once[0] > 0.5
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(at_once, in_parts, strict=True))
    assert 0 < sizes[1] < part * sizes[0]


# --- CoOp and CoCoOp ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start_token", [True, False])
def test_coops_prompt_with_the_embeddings_of_words_is_these_words(world, start_token):
    """… with a tokenizer that sets a start token and, like the emoji's, without; only V learns."""
    clip, tokenizer = world.clip, world.clip.tokenizer

    def without_start(texts):
        return F.pad(tokenizer(texts)[:, 1:], (0, 1))

    clip.tokenizer = tokenizer if start_token else without_start
    coop = world.strategy("coop")
    assert coop.vectors.shape == (4, 32)
    for words in ("X X X X", "X to be X"):
        texts = [f"{words} {name}." for name in world.names]
        tokens = clip.tokenizer(texts)[0, start_token:start_token + 4]
        coop.vectors.data[:] = clip.model.token_embedding.weight[tokens]
        got = coop.encode(coop.vectors, coop.tokens)
        assert torch.allclose(got, features.encode_texts(clip, texts), atol=1e-6)
    got[:, 0].sum().backward()
    assert (coop.vectors.grad.abs().sum(1) > 0).all()
    assert clip.model.token_embedding.weight.grad is None


def test_coops_random_start_depends_on_its_generator_alone(world):
    def start(seed):
        generator = torch.Generator().manual_seed(seed)
        return CoOp(world.clip, world.names, "a photo", generator=generator).vectors

    first = start(0)
    assert torch.equal(first, start(0)) and not torch.equal(first, start(1))
    assert first.std().item() == pytest.approx(0.02, rel=0.3)


def test_padding_of_all_prompts_is_left_out(world):
    coop, lengths = world.strategy("coop"), []
    block = world.clip.model.transformer.resblocks[0]
    block.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    coop.encode(coop.vectors, coop.tokens)
    assert lengths == [1 + 4 + 2 + 1 + 1 + 1]  # start, vectors, "red house", full stop, end, one more


def test_a_step_of_coop_encodes_its_texts_once(world, monkeypatch):
    mappers, calls, encode_text = frozen_mappers(), [], world.clip.model.encode_text
    coop, batch = world.strategy("coop", mappers=mappers), world.batch("coop", mappers)
    monkeypatch.setattr(world.clip.model, "encode_text", lambda *args: calls.append(1) or encode_text(*args))
    loss_of(coop, batch)
    assert len(calls) == 1


def test_cocoop_starts_as_the_sources_words(world):
    """… zero-shot, and with a meta-net that is 0 it is CoOp."""
    z, cocoop = unit(5, 32), world.strategy("cocoop")
    logits = cocoop.classifier(world.names)(z)
    text = features.encode_texts(world.clip, [f"a photo of a {name}." for name in world.names])
    assert torch.allclose(logits, world.clip.logit_scale * z @ text.T, atol=1e-4)
    coop = world.strategy("coop")
    coop.vectors.data.copy_(cocoop.vectors)
    assert torch.allclose(logits, coop.classifier(world.names)(z), atol=1e-4)


def test_cocoop_gives_each_image_its_own_prompt(world):
    """Against CoOp with V + π(z), image by image; classes that it was not trained on can be named."""
    cocoop, coop, z = world.strategy("cocoop"), world.strategy("coop"), unit(5, 32)
    torch.nn.init.normal_(cocoop.meta_net[2].weight)
    names = ["tiger", "red house"]
    got = cocoop.classifier(names)(z)
    for image, logits in zip(z, got):
        coop.vectors.data.copy_(cocoop.vectors + cocoop.meta_net(image))
        assert torch.allclose(logits, coop.classifier(names)(image[None])[0], atol=1e-4)
    assert (got[0] - got[1]).abs().max() > 1e-3


def test_a_short_text_tower_takes_fewer_vectors(world):
    """… and leaves eight tokens for start, class and end."""
    text = {"context_length": 10, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 16, "patch_size": 8, "width": 48, "layers": 1, "head_width": 16}
    tokenizer = functools.partial(world.clip.tokenizer, context_length=10)
    clip = replace(world.clip, model=open_clip.CLIP(32, vision, text), tokenizer=tokenizer)
    for kind in (CoOp, CoCoOp):
        assert kind(clip, world.names, "a photo").vectors.shape == (2, 32)


@pytest.mark.parametrize("train", PROMPTS)
def test_a_prompt_learns_the_classes_and_a_checkpoint_gives_it_back(world, train):
    steps, lr = {"coop": (120, 3e-2), "cocoop": (120, 1e-2), "maple": (240, 1e-2)}[train]
    strategy = world.strategy(train)
    train_on(strategy, world.batch(train), steps, lr)
    torch.manual_seed(1)
    loaded = PROMPTS[train](world.clip, world.names, "a photo")
    loaded.load_state_dict(strategy.state_dict())
    results = []
    for prompt in (strategy, loaded):
        with prompt.prompted():
            z = features.encode_images(world.clip, world.items)
        results.append(prompt.classifier(world.names)(z))
    assert torch.equal(*results)
    assert results[0].argmax(1).eq(world.labels).float().mean() > 0.9


# --- MaPLe -------------------------------------------------------------------------------------------


def three_layers(world, **vision):
    """Return a Clip whose towers have three layers; `vision`: what else its image tower is."""
    vision = {"image_size": 16, "patch_size": 8, "width": 48, "layers": 3, "head_width": 16, **vision}
    text = {"context_length": 12, "width": 32, "heads": 2, "layers": 3}
    torch.manual_seed(0)
    return replace(world.clip, model=open_clip.CLIP(32, vision, text).eval().requires_grad_(False))


@pytest.mark.parametrize("phrase", ["a photo", "art", "a black and white sketch"])
@pytest.mark.parametrize("start_token", [True, False])
def test_maples_prompt_starts_as_the_sentence_of_the_source(world, monkeypatch, phrase, start_token):
    """V₁ V₂ are its first two tokens, and the other words stay, for classes seen and unseen."""
    monkeypatch.setattr(MaPLe, "depth", 1)  # deeper vectors start at random
    clip, tokenizer = three_layers(world), world.clip.tokenizer

    def without_start(texts):
        return F.pad(tokenizer(texts)[:, 1:], (0, 1))

    clip.tokenizer = tokenizer if start_token else without_start
    maple, z = MaPLe(clip, world.names, phrase), unit(5, 32)
    assert maple.vectors.shape == (1, 2, 32)
    for names in (world.names, ["tiger", "owl"]):
        text = features.encode_texts(clip, [f"{phrase} of a {name}." for name in names])
        assert torch.equal(maple.encode(maple.vectors, maple.prompts(names)), text)
        assert torch.allclose(maple.classifier(names)(z), clip.logit_scale * z @ text.T, atol=1e-4)
    maple.vectors.data[0] += 1  # V alone is learned: the other words are not in its place
    maple.encode(maple.vectors, maple.tokens)[:, 0].sum().backward()
    assert maple.vectors.grad.abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_maples_towers_take_its_prompts_layer_by_layer(world, monkeypatch, depth):
    """Against both towers gone through by hand; afterwards they are the original ones."""
    monkeypatch.setattr(MaPLe, "depth", depth)
    clip, images = three_layers(world), torch.randn(5, 3, 16, 16)
    model, before = clip.model, clip.encode_image(images)
    maple, m = MaPLe(clip, world.names, "a photo", {"sketch": Mapper(32)}), 2
    assert maple.vectors.shape == (depth, 2, 32)
    maple.vectors.data.normal_()
    x = model.token_embedding(clip.tokenizer([f"X X of a {name}." for name in world.names]))
    x[:, 1:1 + m] = maple.vectors[0]  # behind the start token
    x = x + model.positional_embedding
    for layer, block in enumerate(model.transformer.resblocks):
        if 0 < layer < depth:
            x = torch.cat([x[:, :1], maple.vectors[layer].expand(3, m, 32), x[:, 1 + m:]], 1)
        x = block(x, attn_mask=model.attn_mask)
    t = model.ln_final(x)[range(3), maple.tokens.argmax(1)] @ model.text_projection
    t = F.normalize(t, dim=-1)
    assert torch.allclose(maple.encode(maple.vectors, maple.tokens), t, atol=1e-6)

    visual, coupled = model.visual, [f(v).expand(5, m, 48) for f, v in zip(maple.couplings, maple.vectors)]
    patches = visual.conv1(clip.normalise(images)).flatten(2).mT
    x = torch.cat([visual.class_embedding.expand(5, 1, 48), patches], 1) + visual.positional_embedding
    x = visual.ln_pre(torch.cat([x, coupled[0]], 1))
    for layer, block in enumerate(visual.transformer.resblocks):
        x = block(torch.cat([x[:, :5], coupled[layer]], 1) if 0 < layer < depth else x)
    z = F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)
    with maple.prompted():
        assert torch.allclose(clip.encode_image(images), z, atol=1e-6)
    assert not torch.allclose(before, z, atol=1e-2)

    batch = Batch(torch.tensor([0, 1, 2, 0, 1]), images=images)
    assert torch.allclose(original_and_synthesised(maple, batch)[0], z, atol=1e-6)
    assert torch.allclose(maple.head_for(batch)(z), clip.logit_scale * z @ t.T, atol=1e-4)
    loss_of(maple, batch).backward()
    for name, parameter in maple.named_parameters():
        assert parameter.grad.flatten(1).ne(0).any(1).all() if parameter.ndim > 1 else parameter.grad.any(), name
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(clip.encode_image(images), before)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())


def test_maple_starts_as_the_sources_first_words_and_at_random_below(world):
    clip = three_layers(world)
    maple = MaPLe(clip, world.names, "a photo", generator=torch.Generator().manual_seed(0))
    words = clip.tokenizer(["a photo"])[0, 1:3]
    assert maple.vectors.shape == (3, 2, 32)  # as deep as the towers
    assert torch.equal(maple.vectors[0], clip.model.token_embedding.weight[words])
    assert maple.vectors[1:].std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("vision", [
    {"layers": [1, 1, 1, 1], "head_width": 64, "width": 8}, {"pool_type": "avg"},
    {"attentional_pool": True, "attn_pooler_heads": 2},
])
def test_maple_is_refused_where_prompts_cannot_stand(world, vision, capsys):
    """… in a network of convolutions, or a transformer that would pool them."""
    with pytest.raises(SystemExit) as stop:
        MaPLe(three_layers(world, **vision), world.names, "a photo")
    [line] = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and "Name a ViT" in line


# --- CLIPood -----------------------------------------------------------------------------------------


def test_both_forms_of_clipoods_margin_agree(world):
    """λ times the distance of the texts, on the cosines of the wrong classes: the loss is the same."""
    images, y, scale = torch.randn(5, 3, 16, 16), torch.tensor([0, 1, 2, 1, 0]), world.clip.logit_scale
    loss = loss_of(world.strategy("clipood"), Batch(y, images=images))
    text, z = world.class_text, world.clip.encode_image(images)
    cosines = z @ text.T + 0.3 * (1 - text @ text.T)[y]
    assert torch.allclose(loss, F.cross_entropy(scale * cosines, y), atol=1e-5)
    assert not torch.allclose(loss, F.cross_entropy(scale * z @ text.T, y), atol=1e-3)


def test_clipoods_margin_is_of_the_labels_of_the_ranks_own_rows(world, monkeypatch):
    monkeypatch.setattr(towers, "rows_of_rank", lambda n: [1, 3, 0])  # as of rank 1 of 2, padded
    strategy, z, y = world.strategy("clipood"), unit(3, 32), torch.tensor([0, 1, 2, 2, 0])
    text = world.class_text
    expected = world.clip.logit_scale * (z - 0.3 * text[[1, 2, 0]]) @ text.T
    assert torch.allclose(strategy.head_for(Batch(y))(z), expected, atol=1e-4)


def test_clipoods_average_has_the_weights_of_a_beta_distribution(world):
    alpha = beta_weights(9)
    density = torch.distributions.Beta(0.5, 0.5).log_prob((torch.arange(10) + 0.5) / 10).exp()
    assert torch.allclose(alpha, (density / density.sum()).double(), atol=1e-6)
    assert alpha.sum() == pytest.approx(1) and torch.allclose(alpha, alpha.flip(0))
    strategy, proj = world.strategy("clipood", steps=9), world.clip.model.visual.proj.data
    expected = alpha[0] * proj
    for t in range(1, 10):
        proj.normal_()
        strategy.after_step()
        expected = expected + alpha[t] * proj
    strategy.finish()
    assert torch.allclose(world.clip.model.visual.proj, expected, atol=1e-5)


def test_clipood_learns_the_source_and_without_a_step_is_zero_shot(world):
    strategy = world.strategy("clipood", steps=0)
    strategy.finish()
    assert not changed(world.clip.original, world.clip.model.state_dict())
    strategy = world.strategy("clipood", steps=60)
    train_on(strategy, world.batch("clipood"), 60, 3e-3)
    assert torch.equal(strategy.head.weight, world.class_text)
    z = features.encode_images(world.clip, world.items)
    assert (z @ strategy.head.weight.T).argmax(1).eq(world.labels).float().mean() > 0.9


def test_a_finished_method_leaves_no_gradients_behind(world):
    """They take as much of a GPU's memory as the weights."""
    train_on(world.strategy("towers"), world.batch("towers"))
    assert any(p.grad is not None for p in world.clip.model.parameters())
    world.clip.reset()
    assert all(p.grad is None and not p.requires_grad for p in world.clip.model.parameters())
