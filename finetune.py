"""Finetune CLIP on the source domain: LDFS's step 2, FLYP, ARF. One loop for everything.

    python finetune.py pacs photo --train head --methods finetune lads ldfs
    python finetune.py pacs photo --train visual --methods finetune flyp flyp+captions flyp+retrieved arf arf+ldfs
    torchrun --nproc-per-node 8 -- finetune.py …       # the batch is split over eight GPUs

--train says what is trained, --methods with which losses. No image of a target domain is read here, and no result
chooses anything: the last step is what is kept. Each checkpoint goes to runs/…/checkpoints/; a killed run goes on after
the last finished epoch of a tower, or the last finished head.
"""

import itertools
import math
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn as nn
from tqdm import tqdm

import data
from anchors import load_retrieved
from data import fail
from features import autocast, cached_features, encode_head, freeze_stages, front_features, image_batches, load_clip, ranks
from losses import class_consistency, clip_contrastive
from mapper import load_mapper
from methods import chosen


@dataclass(frozen=True)
class Schedule:
    """AdamW, linear warm-up, cosine to 0. Batches are of source images; epochs are passes over them."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.1     # on all parameters, as in FLYP's public code
    warmup: float = 0.1           # share of all steps
    max_norm: float | None = None  # longest gradient; None: whatever it is


# CHOICE: LDFS's schedules could not be had. head: 200 epochs, as LADS. prompt: the 50 epochs of 32 and lr 2e-3 of CoOp's public
# code, with AdamW. visual, all: the 10 epochs and lr 1e-5 that FLYP uses with OpenAI's ViT-B/16, at a smaller batch;
# alternative: a data set's own `schedules`; --epochs, --batch-size, --lr, chosen on the "val" part.
SCHEDULES = {
    "head": Schedule(epochs=200, batch_size=256, lr=1e-3),
    "prompt": Schedule(epochs=50, batch_size=32, lr=2e-3, weight_decay=0.0),
    "visual": Schedule(epochs=10, batch_size=64, lr=1e-5),
    "all": Schedule(epochs=10, batch_size=64, lr=1e-5),
}


# CHOICE: a linear probe starts at random, as probes do; a whole tower with the text's head, as in WiSE-FT's baseline, for
# the gradients of a random head would spoil it; CoOp's prompt has no head of its own; alternative: --init.
INITS = {"head": "scratch", "prompt": "scratch", "visual": "text", "all": "text"}
CACHED = ("head", "prompt")  # what is trained on the features of a frozen image tower


class Context(nn.Module):
    """CoOp's learned prompt "V₁ … V_M dog.": its M vectors, the same for all classes. Source: CoOp (arXiv 2109.01134), eq. 2.

    CHOICE: M = 16, as CoOp's default, or what a short text tower leaves beside eight tokens; alternative: class-wise vectors.
    """

    def __init__(self, clip, names, generator):
        super().__init__()
        text = getattr(clip.model, "text", clip.model)
        if not hasattr(text, "token_embedding"):
            fail(f"{clip.name}: its text tower is not open_clip's own, which --train prompt needs. Name another model.")
        length = min(16, max(1, text.context_length - 8))
        start = 0.02 * torch.randn(length, text.token_embedding.embedding_dim, generator=generator)
        self.vectors = nn.Parameter(start.to(clip.device))
        self.tokens = clip.tokenizer([f"{'X ' * length}{name}." for name in names]).to(clip.device)  # the X give way to V
        self.clip, self.parts = clip, (text.token_embedding,)  # in a tuple: it is not this module's to train

    def forward(self):
        """T: (C, d) text features of the classes, unit norm."""

        def put(module, tokens, embedded):  # (C, L, width): start of text, V₁ … V_M, class, end of text
            vectors = self.vectors.expand(len(embedded), -1, -1).to(embedded.dtype)
            return torch.cat([embedded[:, :1], vectors, embedded[:, 1 + vectors.shape[1]:]], dim=1)

        hook = self.parts[0].register_forward_hook(put)
        try:
            with autocast(self.clip.device):
                return self.clip.model.encode_text(self.tokens, normalize=True).float()
        finally:
            hook.remove()


@dataclass(frozen=True)
class Anchors:
    """What ARF's two losses are made of, and their weights λ_cap, λ_ret.

    captions: one text for each training image, in their order. retrieved: [(where, text)]; see features.open_image.
    """

    captions: list = ()
    retrieved: list = ()
    lambda_cap: float = 1.0
    lambda_ret: float = 1.0


def lr_at(step, steps, schedule):
    """Learning rate at `step` of `steps`: up in a line, down in a cosine to 0."""
    warm = max(1, round(schedule.warmup * steps))
    if step < warm:
        return schedule.lr * (step + 1) / warm
    return schedule.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def with_synthesised(z, mappers):
    """[z, ẑ^1 … ẑ^K], each (B, d): features of original images, and what the frozen mappers make of them, ẑ^k = M_k(z)."""
    return [z, *(mapper(z) for mapper in mappers)]


def step_loss(features, labels, class_weight, logit_scale):
    """L_2 = L_con(z, y) + Σ_k L_con(ẑ^k, y), LDFS's cross-entropy on original and synthesised features.

    features: [z, ẑ^1 … ẑ^K], each (B, d) unit norm; [z] alone is plain finetuning. class_weight: (C, d).
    Source: LDFS, figure 2, step 2.
    CHOICE: every domain weighs as much as the original, as in LADS's union of features; alternative: the mean over domains.
    """
    return sum(class_consistency(x, class_weight, labels, logit_scale) for x in features)


def arf_loss(features, prompts, captions, retrieved, logit_scale, anchors):
    """L = L_cl + λ_cap L_cap + λ_ret L_ret, each the contrastive loss L_con over the batches of all processes.

    features: [z, ẑ^1 … ẑ^K], each (B, d): FLYP's L_cl = L_con(z, prompts); with LDFS's features + Σ_k L_con(ẑ^k, prompts).
    prompts: (B, d) texts of the images' classes. captions: (B, d) or None. retrieved: (images, texts), (B', d) each, or None.
    Source: ARF, figure 2.
    CHOICE: λ_cap = λ_ret = 1; alternative: --lambda-cap, --lambda-ret. CHOICE: a synthesised feature is contrasted with the
    prompts in the source's words, as in LDFS's L_2; alternative: in the words of its domain.
    """
    pairs = [(1, z, prompts) for z in features]
    if captions is not None:
        pairs += [(anchors.lambda_cap, features[0], captions)]  # the image, encoded once, with its second text
    if retrieved is not None:
        pairs += [(anchors.lambda_ret, *retrieved)]
    return sum(weight * clip_contrastive(gathered(z), gathered(text), logit_scale) for weight, z, text in pairs)


def gathered(x):
    """The rows (B, d) of all processes, (world size · B, d), with gradients to each process's own."""
    return torch.cat(torch.distributed.nn.functional.all_gather(x)) if ranks()[1] > 1 else x


def average_gradients(parameters):
    """What DistributedDataParallel does, in the open: the mean over processes of each gradient."""
    if ranks()[1] > 1:
        for p in parameters:
            if p.grad is not None:
                torch.distributed.all_reduce(p.grad)
                p.grad /= ranks()[1]


def passes(n, batch_size, seed):
    """Batches of indices below n, without end: one shuffled pass after another.

    CHOICE: each step's batch of retrieved pairs is as large as that of images; alternative: one pass an epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    stream = itertools.chain.from_iterable(torch.randperm(n, generator=generator).tolist() for _ in itertools.count())
    while True:
        yield list(itertools.islice(stream, batch_size))


def shares(batches):
    """This process's part of each batch, all of one size: up to (processes - 1) images of a batch are left out."""
    rank, world = ranks()
    return [batch[:len(batch) // world * world][rank::world] for batch in batches if len(batch) >= world]


def views(clip, folder, items, batches, key, kept):
    """Yield (augmented images, indices into `items`) for each of `batches`.

    Where stages are frozen, it is their output instead, kept in `kept[key]` for all methods that see the same views; these
    hang on key = (seed, epoch, what) alone.
    """
    items = [(where, i) for i, (where, _) in enumerate(items)]
    if clip.front is None:
        yield from image_batches(folder, items, clip.augment, batches, clip.device)
    else:
        if key not in kept:
            torch.manual_seed(1000 * key[0] + key[1])
            kept[key] = front_features(clip, folder, items, clip.augment)
        for batch in batches:
            yield kept[key][batch], torch.tensor(batch)


def finetune(clip, dataset, source, seed, train, method, mappers, anchors, schedule, init, run, checkpoint, made_of, kept):
    """Finetune `clip` in place; writes `checkpoint`, and goes on from it if it was `made_of` the same.

    train: "head" (linear head on cached features), "prompt" (CoOp's prompt, likewise), "visual" (image tower and head) or
    "all" (both towers and the logit scale; the head is what the text tower makes of the class prompts).
    init: "text" or "scratch", the head's start.
    kept: a dict for what `views` keeps; runs of one seed may share it.
    Raises FloatingPointError at a loss that is not finite, naming the step.
    """
    items = data.split(dataset, source, source, "train", seed)
    labels_all = torch.tensor([y for _, y in items], device=clip.device)
    templates = data.prompts(dataset, source)
    clip.model.requires_grad_(False)
    class_text = encode_head(clip, templates).to(clip.device)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(class_text.shape, generator=generator) / class_text.shape[1] ** 0.5  # rows of about unit norm
    head = nn.Linear(*reversed(class_text.shape), bias=False, device=clip.device)
    head.weight.data.copy_(class_text if init == "text" else random)
    model, scale = clip.model, torch.tensor(clip.logit_scale, device=clip.device)
    context = Context(clip, dataset.names, generator) if train == "prompt" else None
    trained = {"head": [head], "prompt": [context], "visual": [head, model.visual], "all": [model]}[train]
    parameters = [p.requires_grad_() for module in trained for p in module.parameters()]
    if train in CACHED:
        row, z_all = cached_features(clip, dataset, source, run)
        z_all = z_all[[row[p] for p, _ in items]].to(clip.device)
        features_all = torch.stack(with_synthesised(z_all, mappers), dim=1)  # (N, 1 + K, d), made once: nothing moves
    class_tokens = clip.tokenizer(data.class_texts(dataset, source)).to(clip.device)
    prompt_tokens = torch.stack([clip.tokenizer(texts) for texts in templates]).to(clip.device)  # (T, C, L)

    def encode_image(x):
        with autocast(clip.device):
            z = model.encode_image(x, normalize=True)
        return z.float()  # losses in float32: bfloat16 logits of 100 are steps of a half

    def encode_text(tokens):
        with autocast(clip.device):
            t = model.encode_text(tokens.to(clip.device), normalize=True)
        return t.float()

    optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, weight_decay=schedule.weight_decay, fused=True)
    more = {"head": {}, "prompt": {"context": context}}.get(train, {"clip": model})
    modules = nn.ModuleDict({"head": head, **more})
    steps_per_epoch = math.ceil(len(items) / schedule.batch_size)
    steps, first = schedule.epochs * steps_per_epoch, 0
    if checkpoint.exists() and (state := torch.load(checkpoint, map_location=clip.device))["made_of"] == made_of:
        modules.load_state_dict(state["modules"])
        first = state["epoch"]
        if first < schedule.epochs:
            optimizer.load_state_dict(state["optimizer"])
    retrieved_order = passes(len(anchors.retrieved), schedule.batch_size, seed)
    retrieved_order = itertools.islice(retrieved_order, first * steps_per_epoch if method.retrieved else 0, None)

    epochs = range(first, schedule.epochs)
    bar = tqdm(epochs, checkpoint.stem, initial=first, total=schedule.epochs, unit="epoch", leave=False, disable=ranks()[0] > 0)
    for epoch in bar:
        # order and augmentation hang on (seed, epoch) alone: a resumed run is the uninterrupted one (on a CPU to the bit)
        torch.manual_seed(1000 * seed + epoch + 10**6 * ranks()[0])  # each process augments in its own way
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(items), generator=generator).split(schedule.batch_size)
        template = torch.randint(len(prompt_tokens), (len(items),), generator=generator).to(clip.device)
        order = shares([batch.tolist() for batch in order])
        if train in CACHED:
            batches = ((features_all[i].unbind(1), torch.tensor(i)) for i in order)
        else:
            batches = views(clip, dataset.folder, items, order, (seed, epoch, "images"), kept)
        if method.retrieved:
            batches_of = shares(itertools.islice(retrieved_order, steps_per_epoch))
            retrieved_views = views(clip, dataset.folder, anchors.retrieved, batches_of, (seed, epoch, "retrieved"), kept)
        for i, (x, rows) in enumerate(batches):
            step = epoch * steps_per_epoch + i
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, steps, schedule)
            # CHOICE: where the tower is trained, M_k takes the current z, and passes its gradient on, so that ẑ stays a
            # synthesis of this z; alternative: ẑ of the original z, which the tower then leaves behind.
            features = x if train in CACHED else with_synthesised(encode_image(x), mappers)
            labels, weight = labels_all[rows], head.weight
            if train == "all":
                scale = model.logit_scale.exp()
            if method.contrastive:
                used, back = torch.stack([template[rows], labels]).unique(dim=1, return_inverse=True)  # to encode each once
                prompts, captions, retrieved = encode_text(prompt_tokens[used[0], used[1]])[back], None, None
                if method.captions:
                    captions = encode_text(clip.tokenizer([anchors.captions[row] for row in rows.tolist()]))
                if method.retrieved:
                    x, rows = next(retrieved_views)
                    tokens = clip.tokenizer([anchors.retrieved[row][1] for row in rows.tolist()])
                    retrieved = encode_image(x), encode_text(tokens)
                loss = arf_loss(features, prompts, captions, retrieved, scale, anchors)
            else:
                if train == "all":
                    weight = encode_text(class_tokens)
                if train == "prompt":
                    weight = context()
                loss = step_loss(features, labels, weight, scale)
            if not loss.isfinite():
                raise FloatingPointError(f"{checkpoint.stem}: the loss is {loss.item()} at step {step}")
            optimizer.zero_grad()
            loss.backward()
            average_gradients(parameters)
            if schedule.max_norm:
                nn.utils.clip_grad_norm_(parameters, schedule.max_norm)
            optimizer.step()
            if train == "all":
                model.logit_scale.data.clamp_(max=math.log(100))  # as CLIP was trained
        bar.set_postfix(loss=f"{loss.item():.3f}")
        done = epoch + 1 == schedule.epochs
        if done and train == "all":
            head.weight.data = encode_head(clip, templates).to(clip.device)
        if done and train == "prompt":
            head.weight.data = context().detach()
        if ranks()[0] == 0 and (done or train != "head"):  # a head is done in seconds: only its end is worth a file
            state = {"modules": modules.state_dict(), "epoch": epoch + 1, "made_of": made_of, "base": clip.base}
            if not done:
                state["optimizer"] = optimizer.state_dict()
            data.write_atomically(checkpoint, lambda part: torch.save(state, part))


def checkpoint_path(run, train, init, method, seed):
    return run / "checkpoints" / f"{train}-{init}-{method}-seed{seed}.pt"


def schedules(dataset, args):
    """{train: Schedule}: SCHEDULES with what the data set, and then --epochs, --batch-size and --lr say otherwise."""
    flags = {k: v for k in ("epochs", "batch_size", "lr") if (v := getattr(args, k)) is not None}
    own = dataset.about.get("schedules", {})
    try:
        return {train: replace(SCHEDULES[train], **{**own.get(train, {}), **flags}) for train in SCHEDULES}
    except TypeError:
        fail(f"{dataset.folder / 'dataset.json'}: a schedule has only {', '.join(f.name for f in fields(Schedule))}.")


def cut_frozen(clip, dataset, args):
    """Cut off as many stages of the image tower as --frozen-stages or the data set says; their number."""
    stages = dataset.about.get("frozen_stages", 0) if args.frozen_stages is None else args.frozen_stages
    stages = 0 if args.train in CACHED else stages
    freeze_stages(clip, stages)
    return stages


def main():
    args = data.arguments(__doc__).parse_args()
    methods = chosen(args)
    dataset, run = data.prepare(args)
    init, schedule_of = args.init or INITS[args.train], schedules(dataset, args)
    rank, world = ranks()
    if schedule_of[args.train].batch_size < world:
        fail(f"--batch-size {schedule_of[args.train].batch_size} is less than the {world} processes. Say a larger one.")
    clip = load_clip(args, dataset)
    cut = cut_frozen(clip, dataset, args)
    original = {k: v.clone() for k, v in clip.model.state_dict().items()}

    jobs = [(seed, name) for seed in range(args.seeds) for name in methods]
    kept = {}
    for seed, name in (bar := tqdm(jobs, desc=f"finetuning ({args.train})", unit="run", disable=rank > 0)):
        bar.set_postfix_str(f"{name}, seed {seed}")
        method, items = methods[name], data.split(dataset, args.source, args.source, "train", seed)
        train = "all" if method.contrastive else args.train
        targets = dataset.styles(args.source) if method.recipe else []
        mappers = [load_mapper(run, method.recipe, domain, seed, clip.fingerprint, clip.device) for domain in targets]
        anchors = Anchors(
            data.captions(dataset, [path for path, _ in items]) if method.captions else (),
            load_retrieved(run, dataset, items) if method.retrieved else (),
            args.lambda_cap if method.captions else 1.0, args.lambda_ret if method.retrieved else 1.0,
        )
        texts = repr(([*anchors.captions], [(*where[1:], text) for where, text in anchors.retrieved]))  # wherever they lie
        made_of = {
            "schedule": asdict(schedule_of[train]),
            "frozen stages": cut,
            "model": clip.fingerprint,
            "images": data.sha(repr(items)),
            "prompts": data.sha(repr([data.class_texts(dataset, args.source), *data.prompts(dataset, args.source)])),
            "mappers": data.digest(p for m in mappers for p in m.parameters()),
            "anchors": {"lambda_cap": anchors.lambda_cap, "lambda_ret": anchors.lambda_ret, "texts": data.sha(texts)},
        }
        path = checkpoint_path(run, args.train, init, name, seed)
        clip.model.load_state_dict(original)
        if any(key[0] != seed for key in kept):
            kept.clear()
        try:
            finetune(
                clip, dataset, args.source, seed, train, method, mappers, anchors,
                schedule_of[train], init, run, path, made_of, kept,
            )
        except FloatingPointError as error:
            fail(f"{error}. Try a lower --lr; what is finished is kept.")
    if world > 1:
        torch.distributed.barrier()  # no process leaves while another still needs it
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
