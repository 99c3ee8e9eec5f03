"""LDFS and ARF once more, each as a plain script, beside what run_ldfs.sh and run_arf.sh compute.

The reference below goes from image files to accuracies with open_clip, torch and losses.py alone,
one model, one seed and one mapper at a time, and can be read from top to bottom. From the program
it takes only what a training batch holds (which images and retrieved pairs, and their augmented
pixels), because these are random choices without a right answer; that they are sound choices is
tested first. Weights have to agree to 1e-5 in the root mean square, accuracies exactly.

The world is small and uneven on purpose: domains and classes differ in size, so that a mean over
images is not a mean over domains; two targets, two seeds and several methods run together, so that
a value of one cannot pass for a value of another; the image tower has batch normalisation, whose
statistics training must not touch.
"""

import copy
import hashlib
import io
import itertools
import json
import math
import tarfile
from types import SimpleNamespace

import open_clip
import program
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from losses import (
    class_consistency,
    clip_contrastive,
    local_adaptation,
    pairwise_relation,
    stochastic_text,
)

# -------------------------------------------------------------------------------------------------
# The world: three domains of three classes to finetune on, two other classes, a pool of pairs

PHRASES = {"photo": "a photo", "sketch": "a sketch", "cartoon": "a cartoon"}  # the source is first
TARGETS = ["sketch", "cartoon"]
CLASSES = {"cat": "a cat", "owl": "an owl", "red_house": "a red house"}
NAMES = [name.replace("_", " ") for name in CLASSES]
UNSEEN = {"bus": "a bus", "ice_cream": "an ice cream"}
TEMPLATES = ["a photo of a {}.", "one {}, seen by a camera."]  # of the source's class prompts
COUNTS = {"photo": (230, 120, 20), "sketch": (12, 30, 8), "cartoon": (25, 10, 10)}
UNSEEN_COUNTS = {"photo": (9, 5), "sketch": (4, 6), "cartoon": (7, 3)}
COLOURS = [(220, 60, 60), (60, 200, 60), (60, 60, 220), (200, 200, 60), (60, 180, 200)]
FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}
LINEAR = {"epochs": 5, "batch_size": 100, "lr": 0.01}
TOWERS = {"epochs": 2, "batch_size": 16, "lr": 3e-4}
MAPPER_STEPS, SIGMA = 6, 0.01
SHOTS, LAMBDA_CAP, LAMBDA_RET, K, SAME = 16, 0.5, 2.0, 2, 0.99


def square(colour, generator):
    """Return a PNG file's bytes: 32 × 32 pixels of noise around a colour near to `colour`."""
    colour = torch.tensor(colour) + torch.randint(-50, 50, (3,), generator=generator)
    pixels = colour + torch.randint(-40, 40, (32, 32, 3), generator=generator)
    file = io.BytesIO()
    Image.fromarray(pixels.clamp(0, 255).byte().numpy()).save(file, "png", compress_level=1)
    return file.getvalue()


def write_images(folder, classes, counts, colours, generator):
    """Write {domain}/{class}/*.png and return {domain: [(path, class index)]}, sorted."""
    images = {}
    for darkness, (domain, numbers) in enumerate(counts.items()):
        images[domain] = []
        for y, (name, n, colour) in enumerate(zip(classes, numbers, colours)):
            (folder / domain / name).mkdir(parents=True)
            for i in range(n):
                path = f"{domain}/{name}/{i:03d}.png"
                shade = [int(value * (1 - 0.2 * darkness)) for value in colour]
                (folder / path).write_bytes(square(shade, generator))
                images[domain].append((path, y))
    return images


def write_shard(path, pairs):
    """Write [(image bytes, text)] as a webdataset shard."""
    with tarfile.open(path, "w") as tar:
        for i, (image, text) in enumerate(pairs):
            for name, content in (f"{i:03d}.png", image), (f"{i:03d}.txt", text.encode()):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_captions(world):
    rows = [{"path": path, "caption": text} for path, text in world.captions.items()]
    (world.set / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def describe(world):
    """Write both data sets' dataset.json."""
    about = {
        "phrases": world.phrases, "fractions": FRACTIONS, "templates": {"photo": TEMPLATES},
        "unseen": "others", "schedules": {
            "linear": LINEAR, "full": TOWERS, "lpft": TOWERS, "towers": TOWERS,
        },
    }
    (world.set / "dataset.json").write_text(json.dumps(about))
    (world.others / "dataset.json").write_text(json.dumps({"phrases": world.phrases}))


def write_world(folder, counts=COUNTS):
    """Write the world and return where its parts are, and what they hold."""
    generator = torch.Generator().manual_seed(0)
    world = SimpleNamespace(set=folder / "data" / "tiny", others=folder / "data" / "others")
    world.phrases, world.pool_folder = dict(PHRASES), folder / "pool"
    world.images = write_images(world.set, CLASSES, counts, COLOURS, generator)
    world.unseen = write_images(world.others, UNSEEN, UNSEEN_COUNTS, COLOURS[3:], generator)
    describe(world)
    # every image has its own caption; some begin like a prompt, which the program takes off
    adjectives, places = ["small", "old", "happy", "dirty", "quiet"], ["snow", "grass", "rain"]
    words = itertools.cycle(itertools.product(["a photo of a", "the", "one"], adjectives, places))
    world.captions = {
        path: "{} {} {} in {} {}".format(*word[:2], path.split("/")[1], word[2], i)
        for i, ((path, _), word) in enumerate(zip(world.images["photo"], words))
    }
    write_captions(world)
    # the second shard has a copy of an unseen class's image, and repeats a pair of the first
    pairs = [(square(COLOURS[i % 5], generator), f"a thing {i} on a table") for i in range(24)]
    pairs[15] = (world.others / "photo/bus/003.png").read_bytes(), "a copied bus"
    pairs[20] = pairs[2]
    world.pool_folder.mkdir()
    write_shard(world.pool_folder / "00000.tar", pairs[:12])
    write_shard(world.pool_folder / "00001.tar", pairs[12:])
    world.file_of = {hashlib.sha256(image).hexdigest(): image for image, _ in pairs}
    world.pool = [(hashlib.sha256(image).hexdigest(), text) for image, text in pairs]
    return world


def write_model(folder):
    """Write a CLIP of random weights whose features tell the world's images apart, for open_clip.

    A random tower gives all images nearly the same feature. Statistics of batch normalisation from
    coloured squares, and a mean feature of zero, spread them.
    """
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
    text = {"context_length": 16, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 32, "vision_cfg": {**vision, "patch_size": None}, "text_cfg": text}
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).train().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics become those of the next batch
            module.weight.uniform_(0.5, 1.5), module.bias.normal_(std=0.3)
    model.visual.attnpool.positional_embedding *= 16  # or attention would have hardly a gradient
    squares = torch.rand(64, 3, 1, 1) * 2 - 1 + torch.rand(64, 3, 32, 32) - 0.5
    model.encode_image(squares.clamp(-1, 1))
    model.eval().visual.attnpool.c_proj.bias -= model.encode_image(squares).mean(0)
    model.token_embedding.weight *= 30
    model.logit_scale.fill_(math.log(110))  # above 100, where the first step has to bring it
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    about = {"model_cfg": config, "preprocess_cfg": {**preprocess, "resize_mode": "shortest"}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))


# -------------------------------------------------------------------------------------------------
# The reference


class Reference:
    """What both papers compute on one world. A head is a function from features to logits."""

    def __init__(self, world, model_name):
        self.world = world
        self.clip, _, self.preprocess = open_clip.create_model_and_transforms(model_name)
        self.clip.eval().requires_grad_(False)
        self.tokenize = open_clip.get_tokenizer(model_name)
        self.s = self.clip.logit_scale.exp().item()
        self.z_of = {}  # original features of each folder's images

    # --- images and texts -----------------------------------------------------------------------

    def split(self, part, seed, shots=None):
        """Return the source's images of one part, [(path, y)], by the rank of a hash."""
        def rank(path):
            return hashlib.sha256(f"tiny {seed} {path}".encode()).hexdigest()

        items, chosen = self.world.images["photo"], []
        for y in range(len(CLASSES)):
            ranked = sorted((path for path, label in items if label == y), key=rank)
            train, val = (round(FRACTIONS[name] * len(ranked)) for name in ("train", "val"))
            parts = {"train": ranked[:train][:shots], "val": ranked[train:train + val]}
            chosen += [(path, y) for path in parts.get(part, ranked[train + val:])]
        return sorted(chosen)

    def encode(self, model, folder, items):
        """z: (N, d) unit-norm features of [(path, y)] in `folder`."""
        images = [self.preprocess(Image.open(folder / path).convert("RGB")) for path, _ in items]
        return F.normalize(model.encode_image(torch.stack(images)), dim=-1)

    def z(self, items, folder=None):
        """Likewise by the original model, which encodes each image once."""
        folder = folder or self.world.set
        new = [item for item in items if (folder, item) not in self.z_of]
        if new:
            z = self.encode(self.clip, folder, new)
            self.z_of.update({(folder, item): row for item, row in zip(new, z)})
        return torch.stack([self.z_of[folder, item] for item in items])

    def text(self, model, strings):
        return F.normalize(model.encode_text(self.tokenize(strings)), dim=-1)

    def classifier(self, model):
        """T: (C, d), the mean over the templates of each class's prompts, unit norm."""
        t = [self.text(model, [template.format(name) for name in NAMES]) for template in TEMPLATES]
        return F.normalize(torch.stack(t).mean(0), dim=-1)

    def unseen_classifier(self, model):
        return self.text(model, [f"a photo of {noun}" for noun in UNSEEN.values()])

    def steering_texts(self, direction, domain, items):
        """t^k: (N, d), of each image's caption or class in the words of `domain`."""
        nouns = [*CLASSES.values()]
        if direction == "caption":
            things = [self.world.captions[path].removeprefix("a photo of ") for path, _ in items]
        else:
            things = [nouns[y] for _, y in items]
        phrase = self.world.phrases[domain]
        return self.text(self.clip, [f"{phrase} of {thing}" for thing in things])

    # --- LDFS, step 1 ---------------------------------------------------------------------------

    def mapper(self, recipe, domain, seed, shots=None):
        """Train M_k on the training images and return its weights [W₁, b₁, W₂, b₂]."""
        z, y, t_s, t_k = self.mapper_data(recipe, domain, self.split("train", seed, shots))
        d, width, generator = z.shape[1], 384, torch.Generator().manual_seed(seed)
        m = [torch.empty(width, d), torch.empty(width), torch.empty(d, width), torch.empty(d)]
        for parameter, fan_in in zip(m, (d, d, width, width)):
            parameter.uniform_(-fan_in**-0.5, fan_in**-0.5, generator=generator).requires_grad_()
        generator = torch.Generator().manual_seed(seed)
        if recipe == "lads":
            return self.train_lads(m, z, y, t_s, t_k, domain, seed, generator)
        class_text = self.classifier(self.clip)
        optimizer = torch.optim.AdamW(m, weight_decay=0.05)
        for step in range(MAPPER_STEPS):
            fall = (1 + math.cos(math.pi * step / MAPPER_STEPS)) / 2
            optimizer.param_groups[0]["lr"] = 3e-3 * fall
            i = torch.randperm(len(z), generator=generator)[:128]
            z_hat = synthesise(m, z[i])
            if recipe == "ldfs":  # each text has its own noise, the source's is drawn first
                t_s_i = stochastic_text(t_s[i], SIGMA, generator)
                t_k_i = stochastic_text(t_k[i], SIGMA, generator)
                loss = local_adaptation(z[i], z_hat, t_s_i, t_k_i) + pairwise_relation(z[i], z_hat)
            else:  # "global": directions of classes, no noise, no pairwise term
                loss = local_adaptation(z[i], z_hat, t_s[i], t_k[i])
            loss = loss + class_consistency(z_hat, class_text, y[i], logit_scale=1)
            descend(optimizer, loss)
        return m

    def mapper_data(self, recipe, domain, items):
        direction = "caption" if recipe == "ldfs" else "class"
        t_s, t_k = (self.steering_texts(direction, name, items) for name in ("photo", domain))
        return self.z(items), labels_of(items), t_s, t_k

    def train_lads(self, m, z, y, t_s, t_k, domain, seed, generator):
        """LADS as published: class weights, no logit scale, and the epoch of the best val loss."""
        class_text = self.text(self.clip, [f"a photo of {noun}" for noun in CLASSES.values()])
        weight = 1 / y.bincount()  # inverse to the classes' numbers of training images

        def loss_on(z, y, t_s, t_k):
            output = F.relu(z @ m[0].T + m[1]) @ m[2].T + m[3]
            logits = F.normalize(output, dim=-1) @ class_text.T
            direction = local_adaptation(z, output, t_s, t_k)  # of the output before normalisation
            return (direction + F.cross_entropy(logits, y, weight)) / 2

        val = self.mapper_data("lads", domain, self.split("val", seed))
        optimizer = torch.optim.AdamW(m, lr=0.005, weight_decay=0.05, eps=1e-6)
        best, lowest = None, math.inf
        for _ in range(MAPPER_STEPS):  # epochs
            for i in torch.randperm(len(z), generator=generator).split(256):
                descend(optimizer, loss_on(z[i], y[i], t_s[i], t_k[i]))
            loss = loss_on(*val).item()
            if loss < lowest:
                best, lowest = [p.detach().clone() for p in m], loss
        return best

    # --- LDFS, step 2, and ARF ------------------------------------------------------------------

    def probe(self, batches, mappers, seed, init="scratch"):
        """W: (C, d), trained by Σ CE( s · W x, y ) over x = z, ẑ^1, …, ẑ^K; all features stay."""
        w = torch.randn(len(CLASSES), 32, generator=torch.Generator().manual_seed(seed)) / 32**0.5
        w = (w if init == "scratch" else self.classifier(self.clip)).requires_grad_()

        def loss(batch):
            z = self.z([*zip(batch.paths, batch.labels.tolist())])
            return sum(F.cross_entropy(self.s * x @ w.T, batch.labels)
                       for x in (z, *(synthesise(m, z) for m in mappers)))

        train([w], batches, loss, LINEAR["lr"])
        return w.detach()

    def full(self, batches, mappers=(), start=None):
        """Train image tower and head, CE( W z + b, y ), where W starts as s times unit rows."""
        model = copy.deepcopy(self.clip)
        w = self.s * (self.classifier(self.clip) if start is None else start)
        b = torch.zeros(len(CLASSES))
        w.requires_grad_(), b.requires_grad_(), model.visual.requires_grad_()
        parameters = [w, b, *model.visual.parameters()]

        def loss(batch):
            z = F.normalize(model.encode_image(batch.pixels), dim=-1)
            return sum(F.cross_entropy(x @ w.T + b, batch.labels)
                       for x in (z, *(synthesise(m, z) for m in mappers)))  # M_k takes today's z

        train(parameters, batches, loss, TOWERS["lr"], max_norm=1.0)
        return model.requires_grad_(False), w.detach(), b.detach()

    def contrastive(self, batches, anchors=False, mappers=()):
        """FLYP, or ARF with both anchors: L = L_cl + λ_cap L_cap + λ_ret L_ret, all weights."""
        model = copy.deepcopy(self.clip).requires_grad_()

        def l_con(images, tokens):
            t = F.normalize(model.encode_text(tokens), dim=-1)
            return clip_contrastive(images, t, model.logit_scale.exp())

        def loss(batch):
            z = F.normalize(model.encode_image(batch.pixels), dim=-1)
            total = l_con(z, batch.prompts)
            if anchors:
                z_ret = F.normalize(model.encode_image(batch.pool_pixels), dim=-1)
                total = total + LAMBDA_CAP * l_con(z, batch.captions)
                total = total + LAMBDA_RET * l_con(z_ret, batch.pool_texts)
            return total + sum(l_con(synthesise(m, z), batch.prompts) for m in mappers)

        def clamp():  # the factor stays below 100, as in CLIP's own training
            model.logit_scale.data.clamp_(max=math.log(100))

        train([*model.parameters()], batches, loss, TOWERS["lr"], after=clamp)
        return model.requires_grad_(False)

    # --- evaluation -----------------------------------------------------------------------------

    def accuracies(self, seed, head, model=None, unseen_head=None):
        """Return {column: per cent}: the source's test part, whole targets, means over domains."""
        def z(folder, items):
            return self.encode(model, folder, items) if model else self.z(items, folder)

        parts = {"photo": self.split("test", seed)}
        parts |= {domain: self.world.images[domain] for domain in TARGETS}
        row = {k: accuracy(head(z(self.world.set, items)), items) for k, items in parts.items()}
        row["OOD mean"] = sum(row[domain] for domain in TARGETS) / len(TARGETS)
        if unseen_head:
            unseen = {
                f"unseen {domain}": accuracy(unseen_head(z(self.world.others, items)), items)
                for domain, items in self.world.unseen.items()
            }
            row |= {**unseen, "unseen mean": sum(unseen.values()) / len(unseen)}
        return row

    def model_accuracies(self, seed, model, w=None, b=0):
        """Likewise of a finetuned model: by its head (w, b), or by its own class prompts."""
        t = self.classifier(model) if w is None else w
        unseen = self.unseen_classifier(model)
        return self.accuracies(seed, lambda z: z @ t.T + b, model, lambda z: z @ unseen.T)

    def halfway(self, model):
        """θ = (1 − α) θ_0 + α θ at α = 0.5, entry by entry."""
        mixed = copy.deepcopy(model)
        for new, old in zip(mixed.state_dict().values(), self.clip.state_dict().values()):
            if new.is_floating_point():
                new.copy_((old + new) / 2)
        return mixed

    def neighbours(self, z_hat, domain):
        """Return for each synthesised feature the nearest real image of `domain`, [(path, y)]."""
        items = self.world.images[domain]
        return [items[j] for j in (z_hat @ self.z(items).T).argmax(1).tolist()]

    # --- retrieval ------------------------------------------------------------------------------

    def pool_image(self, name):
        return self.preprocess(Image.open(io.BytesIO(self.world.file_of[name])))

    def retrieve(self):
        """Return {(image's name, text): {path: cosine}} of the pool's pairs, in its order, that are
        among the K nearest of a source image, each image once, without images of a data set.
        """
        pool = self.world.pool
        pixels = torch.stack([self.pool_image(name) for name, _ in pool])
        z_pool = F.normalize(self.clip.encode_image(pixels), dim=-1)
        queries = self.world.images["photo"]
        scores, rows = (self.z(queries) @ z_pool.T).topk(K)
        queries_of = {}  # pair: {path of the image whose neighbour it is: cosine}
        for (path, _), *nearest in zip(queries, scores.tolist(), rows.tolist()):
            for score, row in zip(*nearest):
                queries_of.setdefault(pool[row], {})[path] = score
        sets = (self.world.set, self.world.images), (self.world.others, self.world.unseen)
        for folder, images in sets:
            for items in images.values():
                copied = (z_pool @ self.z(items, folder).T).amax(1) > SAME
                for pair in itertools.compress(pool, copied.tolist()):
                    queries_of.pop(pair, None)
        return {pair: queries_of[pair] for pair in dict.fromkeys(pool) if pair in queries_of}


def labels_of(items):
    return torch.tensor([y for _, y in items])


def accuracy(logits, items):
    return 100 * (logits.argmax(1) == labels_of(items)).sum().item() / len(items)


def synthesise(m, z):
    """ẑ = norm( W₂ ReLU( W₁ z + b₁ ) + b₂ )"""
    return F.normalize(F.relu(z @ m[0].T + m[1]) @ m[2].T + m[3], dim=-1)


def descend(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def train(parameters, batches, loss, lr, max_norm=None, after=lambda: None):
    """AdamW; at every step the rate rises, over the first 10 %, then falls in a cosine to 0."""
    optimizer, steps = torch.optim.AdamW(parameters, weight_decay=0.1), len(batches)
    warm = max(1, round(0.1 * steps))
    for step, batch in enumerate(batches):
        rise, fall = (step + 1) / warm, (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
        optimizer.param_groups[0]["lr"] = lr * (rise if step < warm else fall)
        optimizer.zero_grad()
        loss(batch).backward()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        after()


# -------------------------------------------------------------------------------------------------
# The program, run once for each paper

SEEDS = [0, 1]
LDFS_METHODS = ["finetune", "lads", "global", "ldfs"]
ARF_METHODS = ["finetune", "lpft", "ldfs", "flyp", "arf", "arf+ldfs"]  # --train is full here
PROBE = "lpft-probe"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def reference(world, model):
    return Reference(world, model)


def run(paper, folder, world, model, *flags):
    common = ["tiny", "photo", "--data", world.set.parent, "--model", model]
    common += ["--mapper-steps", MAPPER_STEPS]
    if paper == "arf":
        common += ["--pool", world.pool_folder, "--k", K, "--same", SAME]
        common += ["--lambda-cap", LAMBDA_CAP, "--lambda-ret", LAMBDA_RET]
    return program.run(paper, folder, *common, *flags)


@pytest.fixture(scope="module")
def ldfs(world, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ldfs") / "run"
    flags = ["--methods", *LDFS_METHODS, "--seeds", len(SEEDS), "--alphas", 0.5]
    return SimpleNamespace(folder=folder, record=run("ldfs", folder, world, model, *flags))


@pytest.fixture(scope="module")
def arf(world, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arf") / "run"
    flags = ["--methods", *ARF_METHODS, "--seeds", len(SEEDS), "--alphas", 0.5, "--shots", SHOTS]
    return SimpleNamespace(folder=folder, record=run("arf", folder, world, model, *flags))


def batches_of(result, method, seed):
    """Return the batches that one method was trained on with one seed, in their order."""
    return [b for b in result.record.batches if (b.method, b.seed) == (method, seed)]


def distance(got, expected):
    """Return the largest root mean square difference of a tensor in two models, and its name.

    got, expected: state dicts, or lists of tensors. It is a mean because Adam scales up the
    rounding noise of single gradients near zero. A bias of attention's keys has no other gradient,
    since it adds the same to all scores, which softmax does not see: it is left out.
    """
    if isinstance(got, list):
        got, expected = ({str(i): w for i, w in enumerate(weights)} for weights in (got, expected))
    assert got.keys() == expected.keys()
    differences = []
    for name, value in got.items():
        difference = (value - expected[name]).detach().double()
        if name.endswith("in_proj_bias"):  # of queries, keys and values
            difference = difference.view(3, -1)[[0, 2]]
        if not name.endswith("k_proj.bias"):
            differences.append((difference.square().mean().sqrt().item(), name))
    return max(differences)


def assert_close(got, expected):
    largest, name = distance(got, expected)
    assert largest < 1e-5, name


def assert_same(got, expected):
    """Compare two tables of accuracies. A result keeps six decimals; an image more is 1 or so."""
    assert got == pytest.approx(expected, abs=1e-5)


def state_of(model, w=None, b=None):
    """Return what a checkpoint of these modules is to hold."""
    state = {f"towers.{name}": value for name, value in model.state_dict().items()}
    return state if w is None else {**state, "head.weight": w, "head.bias": b}


# -------------------------------------------------------------------------------------------------
# What the batches hold


@pytest.mark.parametrize("paper", ["ldfs", "arf"])
def test_every_epoch_has_each_training_image_once_in_an_order_of_its_own(paper, reference, request):
    result, methods = request.getfixturevalue(paper), LDFS_METHODS
    if paper == "arf":
        methods = [*ARF_METHODS, PROBE]
    for method in methods:
        orders = []  # of positions in the sorted training part, because parts of seeds differ
        for seed in SEEDS:
            items = reference.split("train", seed, SHOTS if paper == "arf" else None)
            position = {path: i for i, (path, _) in enumerate(items)}
            schedule = LINEAR if paper == "ldfs" or method == PROBE else TOWERS
            batches = batches_of(result, method, seed)
            for epoch in range(schedule["epochs"]):
                in_epoch = [batch for batch in batches if batch.epoch == epoch]
                paths = [path for batch in in_epoch for path in batch.paths]
                assert sorted(paths) == [path for path, _ in items]
                assert {len(batch.paths) for batch in in_epoch[:-1]} <= {schedule["batch_size"]}
                assert torch.equal(
                    torch.cat([batch.labels for batch in in_epoch]),
                    torch.tensor([dict(items)[path] for path in paths]),
                )
                orders.append([position[path] for path in paths])
            assert len(batches) == schedule["epochs"] * len(in_epoch)
        assert all(a != b and a != sorted(a) for a, b in itertools.combinations(orders, 2))


def test_pixels_prompts_and_captions_belong_to_the_images(arf, world, reference):
    tokens = torch.stack([reference.tokenize([t.format(n) for n in NAMES]) for t in TEMPLATES])
    for method, seed in itertools.product(ARF_METHODS, SEEDS):
        for batch in batches_of(arf, method, seed):
            images = [Image.open(world.set / path) for path in batch.paths]
            colours = torch.stack([reference.preprocess(image).mean((1, 2)) for image in images])
            # a crop of 90 % or more of a square of noise keeps its mean colour
            assert (batch.pixels.mean((2, 3)) - colours).abs().max() < 0.05
            if method in ("flyp", "arf", "arf+ldfs"):
                assert (tokens[:, batch.labels] == batch.prompts).all(2).any(0).all()
            if method in ("arf", "arf+ldfs"):
                captions = reference.tokenize([world.captions[path] for path in batch.paths])
                assert torch.equal(batch.captions, captions)


@pytest.mark.parametrize("method", ["finetune", "flyp", "arf"])
def test_augmentation_and_templates_differ_by_epoch_and_seed(method, arf, reference):
    views, templates = {}, {}  # {(seed, epoch): {(position, path): pixels}}, … {position: first?}
    first = reference.tokenize([TEMPLATES[0].format(name) for name in NAMES])               # (C, L)
    for batch in batches_of(arf, method, 0) + batches_of(arf, method, 1):
        paths = [path for path, _ in reference.split("train", batch.seed, SHOTS)]
        positions, draw = [paths.index(path) for path in batch.paths], (batch.seed, batch.epoch)
        views.setdefault(draw, {}).update(zip(zip(positions, batch.paths), batch.pixels))
        if method != "finetune":
            is_first = (batch.prompts == first[batch.labels]).all(1).tolist()
            templates.setdefault(draw, {}).update(zip(positions, is_first))
    for a, b in itertools.combinations(views.values(), 2):
        both = a.keys() & b.keys()  # what a generator without seed or epoch would augment alike
        # a crop is now and then the whole image
        assert both and sum(torch.equal(a[key], b[key]) for key in both) <= len(both) / 2
    assert all(a != b for a, b in itertools.combinations(templates.values(), 2))
    assert all({*drawn.values()} == {True, False} for drawn in templates.values())


def test_retrieved_pairs_are_the_nearest_and_none_is_an_image_of_a_data_set(arf, reference):
    expected = reference.retrieve()
    got = program.retrieved(arf.folder)
    assert [(name, text) for name, text, _ in got] == [*expected]
    for name, text, scores in got:
        assert scores == pytest.approx(expected[name, text], abs=1e-3)  # kept with few digits
    assert "a copied bus" not in {text for _, text in expected}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", ["arf", "arf+ldfs"])
def test_a_seed_trains_on_pairs_that_its_own_images_found(method, seed, arf, reference):
    expected = reference.retrieve()
    paths = {path for path, _ in reference.split("train", seed, SHOTS)}
    own = sorted(name for (name, _), scores in expected.items() if paths & scores.keys())
    assert len(own) < len(expected)  # others were found by images that are not trained on
    batches = batches_of(arf, method, seed)
    drawn = [name for batch in batches for name in batch.pool]
    # an endless loader: a pass through all pairs, then another in another order
    passes = [drawn[i:i + len(own)] for i in range(0, len(drawn), len(own))]
    assert len(passes) > 2 and len({*map(tuple, passes)}) == len(passes)
    assert all(sorted(names) == own for names in passes[:-1])
    text_of = dict(expected.keys())
    for batch in batches:
        assert len(batch.pool) == TOWERS["batch_size"]
        texts = reference.tokenize([text_of[name] for name in batch.pool])
        assert torch.equal(batch.pool_texts, texts)
        colours = torch.stack([reference.pool_image(name) for name in batch.pool]).mean((2, 3))
        assert (batch.pool_pixels.mean((2, 3)) - colours).abs().max() < 0.05


# -------------------------------------------------------------------------------------------------
# What is computed from them


def mappers_of(result, recipe, seed):
    """Return the program's [M_k of each target], which step 2 and the pictures start from.

    They are the reference's but for rounding, which step 2 would otherwise amplify.
    """
    return [program.mapper_weights(result.folder, recipe, domain, seed) for domain in TARGETS]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("paper, recipe", [
    ("ldfs", "lads"), ("ldfs", "global"), ("ldfs", "ldfs"), ("arf", "ldfs"),
])
def test_mappers(paper, recipe, seed, reference, request):
    trained = mappers_of(request.getfixturevalue(paper), recipe, seed)
    for domain, mapper in zip(TARGETS, trained):
        shots = SHOTS if paper == "arf" else None
        assert_close(mapper, reference.mapper(recipe, domain, seed, shots))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", LDFS_METHODS)
def test_ldfs_probes_and_their_accuracies(method, seed, ldfs, reference):
    used = [] if method == "finetune" else mappers_of(ldfs, method, seed)
    w = reference.probe(batches_of(ldfs, method, seed), used, seed)
    assert_close(program.weights(ldfs.folder, method, seed), {"head.weight": w})
    got = program.accuracies(ldfs.folder, method, seed)
    assert_same(got, reference.accuracies(seed, lambda z: z @ w.T))
    # the scale is outside of W, so that the zero-shot head it is mixed with has unit rows
    mixed = (reference.classifier(reference.clip) + w) / 2
    got = program.accuracies(ldfs.folder, method, seed, alpha=0.5)
    assert_same(got, reference.accuracies(seed, lambda z: z @ mixed.T))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("paper", ["ldfs", "arf"])
def test_zero_shot_accuracies(paper, seed, reference, request):
    expected = reference.model_accuracies(seed, reference.clip)
    if paper == "ldfs":  # its probes cannot name unseen classes
        expected = {name: value for name, value in expected.items() if "unseen" not in name}
    folder = request.getfixturevalue(paper).folder
    assert_same(program.accuracies(folder, "zero-shot", seed), expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", ["finetune", "lpft", "ldfs"])
def test_finetuned_image_towers_and_their_accuracies(method, seed, arf, reference):
    used = mappers_of(arf, "ldfs", seed) if method == "ldfs" else []
    start = None
    if method == "lpft":
        start = reference.probe(batches_of(arf, PROBE, seed), [], seed, init="text")
    model, w, b = reference.full(batches_of(arf, method, seed), used, start)
    assert_close(program.weights(arf.folder, method, seed), state_of(model, w, b))
    got = program.accuracies(arf.folder, method, seed)
    assert_same(got, reference.model_accuracies(seed, model, w, b))
    w_0 = reference.s * reference.classifier(reference.clip)  # the scale is inside of this head
    expected = reference.model_accuracies(seed, reference.halfway(model), (w_0 + w) / 2, b / 2)
    assert_same(program.accuracies(arf.folder, method, seed, alpha=0.5), expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", ["flyp", "arf", "arf+ldfs"])
def test_contrastive_towers_and_their_accuracies(method, seed, arf, reference):
    used = mappers_of(arf, "ldfs", seed) if method == "arf+ldfs" else []
    model = reference.contrastive(batches_of(arf, method, seed), method != "flyp", used)
    assert_close(program.weights(arf.folder, method, seed), state_of(model))
    got = program.accuracies(arf.folder, method, seed)
    assert_same(got, reference.model_accuracies(seed, model))
    got = program.accuracies(arf.folder, method, seed, alpha=0.5)
    assert_same(got, reference.model_accuracies(seed, reference.halfway(model)))


# -------------------------------------------------------------------------------------------------
# Pictures, and measures of synthesised features


def test_figure_4_shows_the_nearest_real_images(ldfs, reference):
    """The picture is of seed 0, the measures beside it of every seed's own mappers."""
    drawn, test = ldfs.record.figure4, dict(reference.split("test", 0))
    [(_, shown)] = [row for row in drawn.items() if row[0][1] is None]
    assert {*shown} <= test.keys()
    z = reference.z([(path, test[path]) for path in shown])
    for recipe in ("lads", "global", "ldfs"):
        for domain, mapper in zip(TARGETS, mappers_of(ldfs, recipe, 0)):
            near = reference.neighbours(synthesise(mapper, z), domain)
            assert drawn[recipe, domain] == [path for path, _ in near]


@pytest.mark.parametrize("seed", SEEDS)
def test_measures_of_synthesised_features(seed, ldfs, reference):
    source = reference.split("test", seed)
    for recipe in ("lads", "global", "ldfs"):
        for domain, mapper in zip(TARGETS, mappers_of(ldfs, recipe, seed)):
            z_hat, real = synthesise(mapper, reference.z(source)), reference.world.images[domain]
            near = reference.neighbours(z_hat, domain)
            to_target = (z_hat @ reference.z(real).T).amax(1)
            to_source = (z_hat @ reference.z(source).T).amax(1)
            same_class = [y == label for (_, y), (_, label) in zip(near, source)]
            assert_same(program.feature_measures(ldfs.folder, recipe, domain, seed), {
                "domain consistency": 100 * (to_target > to_source).sum().item() / len(source),
                "class consistency": 100 * sum(same_class) / len(source),
                "unique neighbours": 100 * len({*near}) / len(source),
            })


def test_figure_5_shows_each_image_with_its_caption_and_its_nearest_pair(arf, world, reference):
    pairs = reference.retrieve()
    train_paths = {path for path, _ in reference.split("train", 0, SHOTS)}
    assert len({path for path, *_ in arf.record.figure5}) >= 5
    several = 0
    for path, caption, pair in arf.record.figure5:
        assert path in train_paths and caption == world.captions[path]
        scores = {pair: queries[path] for pair, queries in pairs.items() if path in queries}
        several += len(scores) > 1
        name, text = max(scores, key=scores.get)
        assert pair == (pytest.approx(scores[name, text], abs=1e-3), name, text)
    assert several  # or the nearest pair would be the farthest, too


# -------------------------------------------------------------------------------------------------
# What decides about reuse: after a change a run gives what it gives in a new folder


@pytest.fixture(scope="module")
def used_folder(model, tmp_path_factory):
    """Return a world of its own, and the folder of a run that was made before any change."""
    folder = tmp_path_factory.mktemp("reuse")
    world = write_world(folder, {**COUNTS, "photo": (30, 20, 10)})
    small_run(folder / "used" / "run", world, model)
    return folder, world


def small_run(folder, world, model):
    flags = ["--methods", "finetune", "ldfs", "arf", "--shots", 4, "--seeds", 1, "--alphas"]
    return run("arf", folder, world, model, *flags)


def outcome(folder):
    """Return the weights {name: state dict} that a run left, the pairs, and the accuracies."""
    methods = ["finetune", "ldfs", "arf"]
    weights = {method: program.weights(folder, method, 0) for method in methods}
    weights["mapper"] = program.mapper_weights(folder, "ldfs", "sketch", 0)
    tables = [program.accuracies(folder, method, 0) for method in ["zero-shot", *methods]]
    return weights, program.retrieved(folder), tables


def change_caption(world):
    for path in world.captions:
        world.captions[path] += " at night"
    write_captions(world)


def change_phrase(world):
    world.phrases["sketch"] = "a pencil drawing"
    describe(world)


def change_image(world):
    for path, _ in Reference.split(SimpleNamespace(world=world), "train", 0, 4)[:6]:
        (world.set / path).write_bytes(square((128, 128, 128), torch.Generator().manual_seed(7)))


def change_shard(world):
    generator = torch.Generator().manual_seed(8)
    pairs = [(square(COLOURS[i % 5], generator), f"another thing {i}") for i in range(12)]
    write_shard(world.pool_folder / "00001.tar", pairs)


@pytest.mark.parametrize("change, moves", [
    (change_caption, {"ldfs", "arf", "mapper"}), (change_phrase, {"ldfs", "mapper"}),
    (change_image, {"finetune", "ldfs", "arf", "mapper", "pairs"}),
    (change_shard, {"arf", "pairs"}),
])
def test_a_changed_input_gives_what_a_new_folder_gives(change, moves, used_folder, model):
    folder, world = used_folder
    used, new = folder / "used" / "run", folder / change.__name__ / "run"
    before, pairs_before, _ = outcome(used)
    change(world)
    small_run(used, world, model)
    small_run(new, world, model)
    weights, pairs, tables = outcome(used)
    expected, expected_pairs, expected_tables = outcome(new)
    assert pairs == expected_pairs and (pairs != pairs_before) == ("pairs" in moves)
    for name, value in weights.items():
        assert_close(value, expected[name])
        assert (distance(value, before[name])[0] > 1e-4) == (name in moves)
    for table, expected_table in zip(tables, expected_tables):
        assert_same(table, expected_table)
